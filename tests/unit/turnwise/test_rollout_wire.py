"""Groups as msgpack: every one comes back equal, and damaged bytes give one line of our own."""

import random
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.errors import InvalidInput
from turnwise.rollout import (
    NO_OUTCOME,
    EndReason,
    Group,
    Metadata,
    Rollout,
    Status,
    Turn,
    decode_group,
    encode_group,
    pack_ids,
    pack_logprobs,
    pack_mask,
)
from turnwise.scores import GainKind, turn_gains


def small_group() -> Group:
    turns = (
        Turn(start=1, end=4, policy_version=7, packed_logprobs=pack_logprobs([-0.5, -1.0])),
        Turn(start=4, end=5, policy_version=7, packed_logprobs=pack_logprobs([-2.0])),
    )
    rollout = Rollout(
        id="r1",
        packed_ids=pack_ids([11, 21, 22, 23, 70_000]),
        packed_mask=pack_mask([0, 1, 1, 0, 1]),
        prompt_length=1,
        turns=turns,
        scores=(-2.0, -1.0),
        gains=(1.0,),
        score_version=8,
        outcome=1.0,
    )
    return Group(id="run/7", question="Capital of France?", answers=("Paris",), rollouts=(rollout,))


def as_dict(group: Group) -> Any:
    return msgspec.msgpack.decode(encode_group(group))


text = st.text(st.characters(exclude_categories=["Cs"]))
version = st.integers(0, 2**40)
outcome = st.none() | st.floats(-1e6, 1e6)
metadata: st.SearchStrategy[Metadata] = st.dictionaries(
    text, text | st.integers(-(2**63), 2**64 - 1) | st.booleans() | st.none(), max_size=3
)


@st.composite
def rollouts(draw: st.DrawFn, rollout_id: str) -> Rollout:
    mask = [False] * draw(st.integers(1, 9))
    turns: list[Turn] = []
    for turn_mask in draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), max_size=4)):
        logprobs = [draw(st.floats(-1e3, 0.0, width=32)) for policy in turn_mask if policy]
        turns.append(
            Turn(
                start=len(mask),
                end=len(mask) + len(turn_mask),
                policy_version=draw(version),
                packed_logprobs=pack_logprobs(logprobs),
            )
        )
        mask += turn_mask
    scores = [draw(st.none() | st.floats(-1e6, 1e-6)) for _ in turns]
    ids = draw(st.lists(st.integers(0, 2**32 - 1), min_size=len(mask), max_size=len(mask)))
    status = draw(st.sampled_from(get_args(Status)))
    if status != "OK":
        scores = [None] * len(turns)
    gain_kind = draw(st.sampled_from(get_args(GainKind)))
    end_reason = draw(st.none() | st.sampled_from(get_args(EndReason)))
    return Rollout(
        id=rollout_id,
        packed_ids=pack_ids(ids),
        packed_mask=pack_mask(mask),
        prompt_length=turns[0].start if turns else len(mask),
        turns=tuple(turns),
        scores=tuple(scores),
        gains=tuple(turn_gains(scores, gain_kind)) if scores else (),
        gain_kind=gain_kind,
        score_version=draw(version),
        outcome=None if end_reason in NO_OUTCOME else draw(outcome),
        prediction=draw(st.none() | text),
        end_reason=end_reason,
        status=status,
        reason=draw(text.filter(bool)),
        metadata=draw(metadata),
    )


@st.composite
def groups(draw: st.DrawFn) -> Group:
    count = draw(st.integers(1, 3))
    return Group(
        id=draw(text.filter(bool)),
        question=draw(text.filter(bool)),
        answers=tuple(draw(st.lists(text.filter(bool), min_size=1, max_size=3))),
        rollouts=tuple(draw(rollouts(f"r{index}")) for index in range(count)),
        metadata=draw(metadata),
    )


@settings(max_examples=100, deadline=None)
@given(groups())
def test_every_group_comes_back_equal(group: Group) -> None:
    assert decode_group(encode_group(group)) == group


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"not msgpack at all",
        b"\x91" * 100_000,  # deeper than any stack
        b"\x81\xa1x" + b"\x91" * 100_000,
        b"\x82\xaeschema_version\x01\xa8rollouts\xdd\xff\xff\xff\xff",  # promises 4 G rollouts
        b"\x82\xaeschema_version\x01\xa8question\xa1\xff",  # no UTF-8
        encode_group(small_group()) + b"\x00",
        msgspec.msgpack.encode({"schema_version": "1"}),
        msgspec.msgpack.encode([1, 2]),
    ],
)
def test_garbage_is_one_line_of_our_own(data: bytes) -> None:
    with pytest.raises(InvalidInput) as error:
        decode_group(data)
    assert "\n" not in str(error.value)


def test_a_group_cut_at_any_byte_is_refused() -> None:
    data = encode_group(small_group())
    for length in range(len(data)):
        with pytest.raises(InvalidInput):
            decode_group(data[:length])


def test_flipped_bits_give_a_valid_group_or_our_own_error() -> None:
    data, dice = encode_group(small_group()), random.Random(0)
    refused = 0
    for _ in range(5000):
        broken = bytearray(data)
        for _ in range(dice.randint(1, 4)):
            broken[dice.randrange(len(broken))] ^= 1 << dice.randrange(8)
        try:
            group = decode_group(bytes(broken))
        except InvalidInput:
            refused += 1
        else:
            assert decode_group(encode_group(group)) == group
    assert 2500 < refused < 5000


def test_the_reader_names_rollout_and_turn() -> None:
    broken = as_dict(small_group())
    broken["rollouts"][0]["turns"][0]["packed_logprobs"] = pack_logprobs([-1.0, 2.0])
    with pytest.raises(InvalidInput) as error:
        decode_group(msgspec.msgpack.encode(broken))
    assert str(error.value) == "rollouts[0].turns[0].logprobs[1]: 2.0 is no log-prob"
    assert error.value.place == "rollouts[0].turns[0].logprobs[1]"

    broken = as_dict(small_group())
    broken["rollouts"][0]["scores"][1] = "-1"
    with pytest.raises(InvalidInput, match=r"^rollouts\[0\].scores\[1\]: Expected `float \| null`"):
        decode_group(msgspec.msgpack.encode(broken))


@pytest.mark.parametrize("version", [0, 2, 10**9])
def test_the_reader_refuses_another_schema_version_whatever_else_has_changed(version: int) -> None:
    data = msgspec.msgpack.encode({"new": [1], "schema_version": version})
    with pytest.raises(InvalidInput) as error:
        decode_group(data)
    assert str(error.value) == f"schema_version: got {version}, can read 1 only"


def test_the_reader_refuses_what_it_does_not_know() -> None:
    message = as_dict(small_group()) | {"extra\nfield": 1}
    with pytest.raises(InvalidInput) as error:
        decode_group(msgspec.msgpack.encode(message))
    assert str(error.value) == "group: Object contains unknown field `extra field`"

    del message["extra\nfield"], message["question"]
    with pytest.raises(InvalidInput, match="Object missing required field `question`"):
        decode_group(msgspec.msgpack.encode(message))


def test_a_group_above_the_limit_is_refused_before_it_is_read() -> None:
    data = encode_group(small_group())
    with pytest.raises(InvalidInput, match=f"group: {len(data)} bytes exceed the limit of 100"):
        decode_group(data, max_bytes=100)


@pytest.mark.parametrize(
    "change",
    [
        {"question": "\ud800"},
        {"metadata": {"big": 2**70}},
        {"metadata": {"nested": {"no": 1}}},
        {"answers": ("Paris", 5)},
        {"metadata": {"step": np.int64(1)}},
    ],
)
def test_the_writer_refuses_what_no_reader_would_take(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        encode_group(msgspec.structs.replace(small_group(), **change))
