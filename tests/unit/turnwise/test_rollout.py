"""Recorded rollouts: compact, frozen, and refused by name of the place when they are wrong."""

from typing import Any

import msgspec
import numpy as np
import pytest

from turnwise.errors import InvalidInput
from turnwise.rollout import (
    Group,
    Rollout,
    Turn,
    decode_group,
    encode_group,
    group_size_bytes,
    pack_ids,
    pack_logprobs,
    pack_mask,
)

replace = msgspec.structs.replace


def golden_rollout(**changes: Any) -> Rollout:
    """Prompt of 2 tokens, then a a o | a a o | a a (a = policy token, o = tool response)."""
    turns = (
        Turn(start=2, end=5, policy_version=7, packed_logprobs=pack_logprobs([-0.5, -1.0])),
        Turn(start=5, end=8, policy_version=6, packed_logprobs=pack_logprobs([-0.25, 0.0])),
        Turn(start=8, end=10, policy_version=8, packed_logprobs=pack_logprobs([-2.0, -3.0])),
    )
    rollout = Rollout(
        id="r1",
        packed_ids=pack_ids([11, 12, 21, 22, 23, 31, 32, 33, 41, 70_000]),
        packed_mask=pack_mask([0, 0, 1, 1, 0, 1, 1, 0, 1, 1]),
        prompt_length=2,
        turns=turns,
        scores=(-2.0, -1.0, -0.25),
        gains=(1.0, 0.75),
        score_version=8,
        route="torch-packed",
        outcome=1.0,
        prediction="Paris",
        end_reason="answered",
    )
    return replace(rollout, **changes)


def golden_group(*rollouts: Rollout) -> Group:
    return Group(
        id="run/7",
        question="Capital of France?",
        answers=("Paris", "the city of Paris"),
        rollouts=rollouts or (golden_rollout(), golden_rollout(id="r2")),
        metadata={"sequence": 7, "deadline_s": 30.5, "lease": "w1", "held_out": False},
    )


def test_tokens_take_four_bytes_and_a_mask_one_bit_each() -> None:
    assert pack_ids([1, 258]) == bytes([1, 0, 0, 0, 2, 1, 0, 0])
    assert pack_mask([False, True, False, False, True]) == bytes([0b10010])
    assert pack_mask([1] * 9) == bytes([0xFF, 0x01])
    assert pack_logprobs([-1.0]) == bytes([0, 0, 0x80, 0xBF])


def test_arrays_come_back_as_they_went_in_and_cannot_be_changed() -> None:
    rollout = golden_rollout()

    assert rollout.token_ids.tolist() == [11, 12, 21, 22, 23, 31, 32, 33, 41, 70_000]
    assert np.flatnonzero(rollout.policy_mask).tolist() == [2, 3, 5, 6, 8, 9]
    assert [turn.logprobs.tolist() for turn in rollout.turns] == [
        [-0.5, -1.0],
        [-0.25, 0.0],
        [-2.0, -3.0],
    ]
    for array in (rollout.token_ids, rollout.policy_mask, rollout.turns[0].logprobs):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(AttributeError):
        rollout.outcome = 0.0  # type: ignore[misc]


def test_oldest_version_is_the_oldest_that_sampled_a_turn() -> None:
    assert golden_rollout().oldest_version == 6


def test_a_rollout_that_failed_before_its_first_turn_is_still_recorded() -> None:
    failed = Rollout(
        id="r3",
        packed_ids=pack_ids([11, 12]),
        packed_mask=pack_mask([0, 0]),
        prompt_length=2,
        turns=(),
        scores=(),
        gains=(),
        status="DEADLINE",
        reason="30 s passed before the first turn",
    )
    group = golden_group(golden_rollout(), failed)

    assert failed.oldest_version is None
    assert decode_group(encode_group(group)) == group


def test_an_invalid_score_stays_none_and_never_becomes_a_number() -> None:
    rollout = golden_rollout(scores=(-2.0, None, -0.25), gains=(None, None))

    assert decode_group(encode_group(golden_group(rollout))).rollouts[0].scores[1] is None


def test_size_is_the_length_of_the_encoded_group() -> None:
    group = golden_group()

    assert group_size_bytes(group) == len(encode_group(group))


def test_sixteen_rollouts_of_8k_tokens_take_about_a_megabyte() -> None:
    tokens, policy_tokens = 8192, 8000
    turn = Turn(
        start=192,
        end=tokens,
        policy_version=0,
        packed_logprobs=pack_logprobs(np.full(policy_tokens, -1.5)),
    )
    rollout = Rollout(
        id="r0",
        packed_ids=pack_ids(np.arange(tokens)),
        packed_mask=pack_mask(np.arange(tokens) >= tokens - policy_tokens),
        prompt_length=192,
        turns=(turn,),
        scores=(None,),
        gains=(),
    )
    group = golden_group(*(replace(rollout, id=f"r{i}") for i in range(16)))
    arrays = 16 * (4 * tokens + tokens // 8 + 4 * policy_tokens)

    assert arrays == 1_052_672
    assert arrays < group_size_bytes(group) < arrays + 16 * 400


BAD_ROLLOUTS: dict[str, dict[str, Any]] = {
    "id: is empty": {"id": ""},
    "token_ids: are no uint32 values": {"packed_ids": b"\x01\x00\x00"},
    "prompt_length: 0 is not in 1..10": {"prompt_length": 0},
    "prompt_length: 11 is not in 1..10": {"prompt_length": 11},
    "policy_mask: is not one bit for each of 10 tokens": {"packed_mask": b"\x6c"},
    "policy_mask: is not one bit": {"packed_mask": b"\x6c\x07"},  # bit 10 of tokens 0..9
    "policy_mask: marks a prompt token": {"packed_mask": b"\x6d\x03"},
    "policy_mask: marks a prompt": {"packed_mask": b"\x6e\x03"},  # its second token
    "turns: end at token 2 of 10": {"turns": ()},
    "scores: 2 for 3 turns": {"scores": (-2.0, -1.0)},
    "gains: 3 for 3 turns": {"gains": (1.0, 0.75, 0.5)},
    "scores[1]: nan is not in -1e+06..1e-06": {"scores": (-2.0, float("nan"), -0.25)},
    "scores[2]: 0.5 is not in": {"scores": (-2.0, -1.0, 0.5)},
    "scores[1]: '-1' is no number": {"scores": (-2.0, "-1", -0.25)},
    "gains[1]: is -inf, but its scores give 0.75": {"gains": (1.0, float("-inf"))},
    "gains[0]: is nan, but its scores give 1": {"gains": (float("nan"), 0.75)},
    "gains[0]: is 1, but its scores give 1": {"gains": ("1", 0.75)},
    "gains[1]: is None, but its scores give 0.75": {"gains": (1.0, None)},
    "gains[1]: is 0.75001, but": {"gains": (1.0, 0.75001)},
    "gains[0]: is 1.0, but its scores give 0.232544": {"gain_kind": "prob"},
    "gain_kind: probs is unknown": {"gain_kind": "probs"},
    "gains[0]: is valid beside an invalid score": {"scores": (-2.0, None, -1.0)},
    "score_version: is missing for the scores": {"score_version": None},
    "score_version: -1 is below 0": {"score_version": -1},
    "outcome: 1e+308 is not in": {"outcome": 1e308},
    "outcome: '1' is no number": {"outcome": "1"},
    "outcome: is not None for deadline": {"end_reason": "deadline"},
    "outcome: is not None for tool_failed": {"end_reason": "tool_failed", "outcome": 0.0},
    "scores: are not all None for OVERLOADED": {"status": "OVERLOADED", "reason": "no room"},
    "scores: are not all None for DEADLINE": {
        **{"status": "DEADLINE", "reason": "30 s passed"},
        **{"scores": (-2.0, None, None), "gains": (None, None)},
    },
    "status: LATE is unknown": {"status": "LATE"},
    "reason: is empty for ERROR": {"status": "ERROR"},
    "end_reason: bored is unknown": {"end_reason": "bored"},
}


@pytest.mark.parametrize("message", BAD_ROLLOUTS)
def test_a_wrong_rollout_cannot_be_made(message: str) -> None:
    with pytest.raises(InvalidInput) as error:
        golden_rollout(**BAD_ROLLOUTS[message])
    assert str(error.value).startswith(message)


def test_a_gain_may_be_a_difference_of_probabilities() -> None:
    # exp(-1) - exp(-2) and exp(-0.25) - exp(-1)
    rollout = golden_rollout(gain_kind="prob", gains=(0.232544, 0.410921))

    assert decode_group(encode_group(golden_group(rollout))).rollouts[0].gain_kind == "prob"


def test_a_gain_may_differ_from_its_scores_by_a_rounding_that_grows_with_them() -> None:
    scores, gain = (-1e6, -3.0, -2.0), 999_997.0

    assert golden_rollout(scores=scores, gains=(gain + 0.5, 1.0 + 1e-6)).gains[0] == gain + 0.5
    with pytest.raises(InvalidInput, match=r"gains\[0\]"):
        golden_rollout(scores=scores, gains=(gain + 2.0, 1.0))
    with pytest.raises(InvalidInput, match=r"gains\[1\]"):
        golden_rollout(scores=scores, gains=(gain, 1.0 + 4e-6))


def test_a_failed_rollout_keeps_its_tokens_and_teaches_nothing() -> None:
    failed = golden_rollout(
        scores=(None,) * 3, gains=(None,) * 2, status="ERROR", reason="nan in prefix 1"
    )
    late = golden_rollout(id="r2", end_reason="deadline", outcome=None)
    group = golden_group(failed, late)

    assert decode_group(encode_group(group)) == group


BAD_TURNS: dict[str, dict[str, Any]] = {
    "turns[1]: tokens 6..8 do not start at 5": {"start": 6},
    "turns[1]: tokens 5..11 end after the last of 10 tokens": {"end": 11},
    "turns[1].logprobs: 1 for 2 policy tokens": {"packed_logprobs": pack_logprobs([-1.0])},
}


@pytest.mark.parametrize("message", BAD_TURNS)
def test_turns_must_follow_each_other_and_own_their_log_probs(message: str) -> None:
    first, second, third = golden_rollout().turns
    with pytest.raises(InvalidInput) as error:
        golden_rollout(turns=(first, replace(second, **BAD_TURNS[message]), third))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 8, "end": 8}, "tokens 8..8 are no span"),
        ({"start": -1}, "tokens -1..8 are no span"),
        ({"policy_version": -1}, "policy_version: -1 is below 0"),
        ({"packed_logprobs": b"123"}, "logprobs: are no float32 values"),
        ({"packed_logprobs": pack_logprobs([-1.0, 0.5])}, "logprobs[1]: 0.5 is no log-prob"),
        ({"packed_logprobs": pack_logprobs([-1e308, 0.0])}, "logprobs[0]: -inf is no log-prob"),
    ],
)
def test_a_wrong_turn_cannot_be_made(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as error:
        replace(golden_rollout().turns[1], **change)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, "id: is empty"),
        ({"question": ""}, "question: is empty"),
        ({"answers": ()}, "answers: is empty"),
        ({"answers": ("Paris", "")}, "answers: hold an empty text"),
        ({"rollouts": ()}, "rollouts: is empty"),
        ({"rollouts": (golden_rollout(),) * 2}, "rollouts: two of them have the same id"),
    ],
)
def test_a_wrong_group_cannot_be_made(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as error:
        replace(golden_group(), **change)
    assert str(error.value) == message


def test_packing_refuses_what_it_would_have_to_guess() -> None:
    for ids in ([1.5], ["7"], [-1], [2**32], [2**70], [[1, 2], [3]], [[1]], [True], [None]):
        with pytest.raises(InvalidInput, match="token_ids"):
            pack_ids(ids)  # type: ignore[arg-type]
    for mask in ([0, 2], [0.0], ["x"]):
        with pytest.raises(InvalidInput, match="policy_mask"):
            pack_mask(mask)
    for logprobs in (["-1"], [None], [[-1.0]]):
        with pytest.raises(InvalidInput, match="logprobs"):
            pack_logprobs(logprobs)  # type: ignore[arg-type]
