"""The file of `turnwise credit`: every bad input is refused, in one line, in its place."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turnwise import credit_file
from turnwise.credit import PRESETS, CreditOptions, credit
from turnwise.credit_file import change_options, parse, read_bytes, reply
from turnwise.errors import InvalidInput
from turnwise.rollout import Group, Rollout, Turn, encode_group, pack_ids, pack_logprobs, pack_mask
from turnwise.scores import turn_gains

GOOD = '{"groups": [{"rollouts": [{"scores": [-2, -1, -0.2], "outcome": 1}]}]}'


def rollouts(*texts: str) -> bytes:
    """One group of rollouts, each written as JSON."""
    return ('{"groups": [{"rollouts": [' + ", ".join(texts) + "]}]}").encode()


def answer(data: bytes, options: CreditOptions = PRESETS["paper"]) -> Any:
    batch, _ = parse(data)
    return json.loads(reply(batch, credit(batch, options), options))


R0 = '{"scores": [-2, -1], "outcome": 1}'
IN_1 = r"^groups\[0\]\.rollouts\[1\]"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "^input: is empty"),
        (b" \n", "^input: is empty"),
        (b"[]", r"^input: must be an object, got \[\]"),
        (b"{}", "^input: has no 'groups'"),
        (b'{"groups": {}}', "^groups: must be a list, got {}"),
        (b'{"groups": []}', "^groups: is empty"),
        (b'{"groups": [[]]}', r"^groups\[0\]: must be an object"),
        (b'{"groups": [{}]}', r"^groups\[0\]: has no 'rollouts'"),
        (b'{"groups": [{"rollouts": []}]}', r"^groups\[0\]\.rollouts: is empty"),
        (rollouts(R0, "7"), IN_1 + ": must be an object, got 7.0"),
        (rollouts(R0, '{"outcome": 1}'), IN_1 + ": has no 'scores'"),
        (rollouts(R0, '{"scores": [], "outcome": 1}'), IN_1 + r"\.scores: is empty"),
        (rollouts(R0, '{"scores": -1, "outcome": 1}'), IN_1 + r"\.scores: must be a list"),
        (rollouts(R0, '{"scores": [-1]}'), IN_1 + ": has no 'outcome' .*null"),
        (rollouts(R0, '{"scores": [-1], "gains": [], "outcome": 1}'), IN_1 + ": has both"),
        (rollouts(R0, '{"gains": [], "outcome": 1}'), IN_1 + ": has 'gains', but .* 'scores'"),
        (rollouts(R0, '{"score": [-1], "outcome": 1}'), IN_1 + ": unknown .*nearest is 'scores'"),
        (rollouts(R0, '{"scores": [-1], "outcome": 1, "outcome": 0}'), IN_1 + ": has the key"),
        (b'{"groups": [], "options": {}, "option": 1}', "^input: .*nearest is 'options'"),
        (GOOD[:-1].encode() + b', "options": []}', "^options: must be an object"),
        (GOOD[:-1].encode() + b', "options": {"gama": 1}}', "^options: .*nearest is 'gamma'"),
        (b'{"groups": [{"rollout": []}]}', r"^groups\[0\]: unknown .*nearest is 'rollouts'"),
    ],
)
def test_a_wrong_structure_is_refused_in_its_place(data: bytes, problem: str) -> None:
    with pytest.raises(InvalidInput, match=problem):
        parse(data)


@pytest.mark.parametrize(
    "number",
    [
        *("NaN", "Infinity", "-Infinity", "1e999", "-1e308", "0.5", "true", '"-1"', "[-1]", "{}"),
        "-" + "9" * 30,
        "-" + "9" * 6000,
    ],
)
def test_a_score_that_is_no_score_is_refused_in_its_place(number: str) -> None:
    data = rollouts(R0, '{"scores": [-1, null, ' + number + '], "outcome": 1}')

    with pytest.raises(InvalidInput, match=IN_1 + r"\.scores\[2\]: must be a finite number from"):
        parse(data)


@pytest.mark.parametrize("number", ["NaN", "1e308", "false", '"1"', "[1]", "9" * 400])
def test_an_outcome_or_gain_that_is_no_number_is_refused_in_its_place(number: str) -> None:
    with pytest.raises(InvalidInput, match=IN_1 + r"\.outcome: must be a finite number"):
        parse(rollouts(R0, '{"scores": [-1], "outcome": ' + number + "}"))
    with pytest.raises(InvalidInput, match=r"rollouts\[0\]\.gains\[1\]: must be a finite number"):
        parse(rollouts('{"gains": [0, ' + number + '], "outcome": 1}'))


def test_what_is_not_json_is_refused_with_line_and_column() -> None:
    with pytest.raises(InvalidInput, match=r"^line 2, column 3: "):
        parse(b'{"groups":\n [}')
    with pytest.raises(InvalidInput, match=r"^line 1, column 71: Extra data"):
        parse(GOOD.encode() + b"x")
    with pytest.raises(InvalidInput, match=r"^line 1, column 67: "):
        parse(GOOD[:-4].encode())


def test_what_is_not_utf_8_is_refused_with_the_byte() -> None:
    with pytest.raises(InvalidInput, match=r"^byte 11: is not UTF-8"):
        parse(b'{"groups": \xff}')
    with pytest.raises(InvalidInput, match=r"^byte 0: is not UTF-8"):
        parse(GOOD.encode("utf-16"))


def test_a_byte_order_mark_does_no_harm() -> None:
    assert parse(b"\xef\xbb\xbf" + GOOD.encode())[0].outcomes.tolist() == [1.0]


@pytest.mark.parametrize("opening", ["[", '{"groups":', '{"groups":[{"rollouts":[{"scores":['])
def test_deep_nesting_is_refused(opening: str) -> None:
    with pytest.raises(InvalidInput):
        parse((opening + "[" * 100_000).encode())


def test_an_object_of_very_many_keys_is_refused_at_once() -> None:
    keys = ", ".join(f'"k{number}": 1' for number in range(100_000))

    with pytest.raises(InvalidInput, match="'twice' more than once"):
        parse(("{" + keys + ', "twice": 1, "twice": 2}').encode())


def test_a_long_name_is_cut_in_the_message() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse(b'{"' + b"scores\\n" * 100_000 + b'": 1}')
    assert len(str(caught.value)) < 200


def test_input_above_the_limit_is_refused_and_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(100 * 2**20)
    with pytest.raises(InvalidInput, match=r"large\.json: is larger than the limit of 12 MiB"):
        read_bytes(str(path))

    monkeypatch.setattr(credit_file, "MAX_BYTES", 2**20)
    source = io.BytesIO(b" " * 3 * 2**20)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(source))
    with pytest.raises(InvalidInput, match="standard input: is larger than the limit of 1 MiB"):
        read_bytes("-")
    assert source.tell() == 2**20 + 1


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="nowhere: No such file"):
        read_bytes(str(tmp_path / "nowhere"))
    with pytest.raises(InvalidInput, match="Is a directory"):
        read_bytes(str(tmp_path))
    with pytest.raises(InvalidInput, match="null"):
        read_bytes("a\0b")
    with pytest.raises(InvalidInput, match=r"^file: has an empty name"):
        read_bytes("")


def test_the_reply_has_golden_numbers_one_list_per_rollout() -> None:
    second = '{"scores": [-2, -2.1, -1.5], "outcome": 0.4}'
    document = answer(rollouts('{"scores": [-2, -1, -0.2], "outcome": 1.0}', second))

    first, last = document["groups"][0]["rollouts"]
    assert first["gains"] == pytest.approx([1.0, 0.8])
    assert first["normalised"] == pytest.approx([1.025136, 0.542719, 0.999997], abs=1e-6)
    assert first["advantages"] == pytest.approx([2.567852, 1.542716, 0.999997], abs=1e-6)
    assert last["advantages"] == pytest.approx([-2.567852, -0.939694, -0.999997], abs=1e-6)
    assert first["mask"] == [True, True, True]
    statistics = document["groups"][0]["statistics"]
    assert statistics["gains"] == {
        "count": 4,
        "mean": pytest.approx(0.575),
        "std": pytest.approx(0.414578, abs=1e-6),
        "tied": False,
    }
    assert statistics["outcomes"]["mean"] == pytest.approx(0.7)
    assert statistics["zero_signal"] is False
    assert document["options"] == {
        "gain": "log_prob",
        "norm": "separate",
        "gamma": 1.0,
        "outcome_weight": 1.0,
        "gain_weight": 1.0,
    }


def test_null_in_is_null_out_and_leaves_the_loss() -> None:
    data = rollouts(
        '{"scores": [-2, null, -1, -1], "outcome": 1}', '{"scores": [-1], "outcome": null}'
    )
    document = answer(data)

    first, second = document["groups"][0]["rollouts"]
    assert first["gains"] == [None, None, 0.0]
    assert first["mask"] == [False, False, True, True]
    assert second == {"gains": [], "normalised": [0.0], "advantages": [0.0], "mask": [False]}


def test_groups_keep_their_rollouts_and_statistics() -> None:
    document = answer(
        b'{"groups": [{"rollouts": [{"gains": [0.5], "outcome": 0}, {"gains": [], "outcome": 1}]},'
        b' {"rollouts": [{"gains": [2, 4], "outcome": 1}, {"gains": [6], "outcome": 1}]},'
        b' {"rollouts": [{"gains": [], "outcome": 1}]}]}'
    )

    turns = [[len(r["advantages"]) for r in group["rollouts"]] for group in document["groups"]]
    assert turns == [[2, 1], [3, 2], [1]]
    gains = [group["statistics"]["gains"] for group in document["groups"]]
    assert [pool["mean"] for pool in gains] == [0.5, 4.0, None]
    assert [pool["count"] for pool in gains] == [1, 3, 0]
    assert document["zero_signal_groups"] == pytest.approx(1 / 3)
    assert document["tied_outcome_groups"] == pytest.approx(1 / 3)
    assert document["tied_gain_groups"] == 0.0


def test_joint_reports_the_statistics_it_used() -> None:
    data = rollouts(R0, '{"scores": [-2, -2], "outcome": 0}')

    statistics = answer(data, PRESETS["paper_v1"])["groups"][0]["statistics"]

    assert statistics["joint"]["count"] == 4
    assert "joint" not in answer(data)["groups"][0]["statistics"]


def test_no_zero_is_negative() -> None:
    data = rollouts('{"scores": [0.0, -0.0, -1], "outcome": -1}', '{"scores": [-1], "outcome": 0}')
    batch, _ = parse(data)
    options = CreditOptions(outcome_weight=0.0, gamma=0.0)

    text = reply(batch, credit(batch, options), options).decode()

    assert "-0.0," not in text
    assert "-0.0]" not in text


def test_a_preset_sets_what_is_not_named_beside_it() -> None:
    start = CreditOptions(gamma=0.5, gain_weight=2.0)

    changed = change_options(start, {"preset": "paper_v1", "gamma": 0.9}, str)

    assert changed == CreditOptions(gain="prob", norm="joint", gamma=0.9)
    assert change_options(start, {"norm": "raw"}, str) == CreditOptions(
        norm="raw", gamma=0.5, gain_weight=2.0
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"preset": "papre"}, r"^options\.preset: .*nearest is 'paper'"),
        ({"preset": ["paper"]}, r"^options\.preset: "),
        ({"norm": "joined"}, r"^options\.norm: .*nearest is 'joint'"),
        ({"gain": 1.0}, r"^options\.gain: "),
        ({"gamma": -1.0}, r"^options\.gamma: must be a finite number from 0 to 1, got -1"),
        ({"gamma": None}, r"^options\.gamma: "),
        ({"outcome_weight": float("inf")}, r"^options\.outcome_weight: "),
    ],
)
def test_a_wrong_option_is_refused_in_its_place(changes: Any, problem: str) -> None:
    with pytest.raises(InvalidInput, match=problem):
        change_options(CreditOptions(), changes, "options.{}".format)


def recorded(name: str, scores: tuple[float | None, ...], outcome: float | None) -> Rollout:
    turns = tuple(
        Turn(start=1 + k, end=2 + k, policy_version=3, packed_logprobs=pack_logprobs([-1.0]))
        for k in range(len(scores))
    )
    tokens = 1 + len(scores)
    return Rollout(
        id=name,
        packed_ids=pack_ids(np.arange(tokens)),
        packed_mask=pack_mask([0] + [1] * len(scores)),
        prompt_length=1,
        turns=turns,
        scores=scores,
        gains=tuple(turn_gains(scores)) if scores else (),
        score_version=3,
        outcome=outcome,
    )


def recorded_group(*rollouts: Rollout) -> bytes:
    return encode_group(Group(id="run/7", question="Q?", answers=("A",), rollouts=rollouts))


def test_a_recorded_group_is_read_like_its_json() -> None:
    data = recorded_group(
        recorded("r0", (), None),  # it failed before its first turn
        recorded("r1", (-2.0, -1.0, -0.2), 1.0),
        recorded("r2", (-2.0, None, -1.5), 0.4),
    )

    document = answer(data)

    same = answer(
        rollouts(
            '{"scores": [-2, -1, -0.2], "outcome": 1}',
            '{"scores": [-2, null, -1.5], "outcome": 0.4}',
        )
    )
    empty: dict[str, list[float]] = {"gains": [], "normalised": [], "advantages": [], "mask": []}
    assert document["groups"][0]["rollouts"] == [empty, *same["groups"][0]["rollouts"]]
    assert document["groups"][0]["statistics"] == same["groups"][0]["statistics"]


def test_a_recorded_group_is_known_by_each_of_the_heads_of_a_map() -> None:
    data = recorded_group(recorded("r0", (-2.0, -1.0), 1.0), recorded("r1", (-2.0,), 0.0))
    fields, rest = data[0] & 0x0F, data[1:]

    for head in (b"\xde" + fields.to_bytes(2, "big"), b"\xdf" + fields.to_bytes(4, "big")):
        assert answer(head + rest) == answer(data)


def test_a_recorded_group_of_failed_rollouts_has_empty_lists() -> None:
    (group,) = answer(recorded_group(recorded("r0", (), None), recorded("r1", (), None)))["groups"]

    assert [rollout["advantages"] for rollout in group["rollouts"]] == [[], []]
    assert group["statistics"]["zero_signal"] is True


def test_a_truncated_recorded_group_is_refused_wherever_it_ends() -> None:
    data = recorded_group(recorded("r0", (-2.0, -1.0), 1.0))

    for length in range(1, len(data)):
        with pytest.raises(InvalidInput, match=r"^\w+: "):
            parse(data[:length])
