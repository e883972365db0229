"""Sampling over the fake engine: many prompts, n sequences each."""

from collections.abc import AsyncIterator

import pytest

from services.reward_server.engines import SampleChunk, SampleRequest
from services.reward_server.engines.fake_engine import FakeEngine
from services.reward_server.errors import (
    DeadlinePassed,
    InvalidRequest,
    Overloaded,
)
from tests.reward_stand import Stand
from turnwise.v1 import reward_pb2 as pb


async def sample(stand: Stand, **params: object) -> list[pb.SampleResponse]:
    request = pb.SampleRequest(
        prompts=[
            pb.SamplePrompt(prompt_id="a", token_ids=[1, 2]),
            pb.SamplePrompt(prompt_id="b", token_ids=[7]),
        ],
        params=pb.SamplingParams(**params),  # type: ignore[arg-type]
    )
    return [reply async for reply in stand.handlers.sample(request, 5.0)]


async def test_every_prompt_is_continued_n_times() -> None:
    stand = Stand()

    replies = await sample(stand, n=2, max_tokens=2)

    tokens: dict[tuple[str, int, int], list[int]] = {}
    for r in replies:
        tokens.setdefault((r.prompt_id, r.prompt_index, r.sequence_index), []).extend(r.token_ids)
    # The next token is the sum so far plus the sequence's index: 3, 6; 4, 8; 7, 14; 8, 16.
    assert tokens == {
        ("a", 0, 0): [3, 6],
        ("a", 0, 1): [4, 8],
        ("b", 1, 0): [7, 14],
        ("b", 1, 1): [8, 16],
    }
    ended = [r for r in replies if r.finish_reason]
    assert [r.finish_reason for r in ended] == [pb.FINISH_REASON_LENGTH] * 4
    assert all(r.HasField("usage") for r in ended)
    assert stand.value("sampled_tokens_total") == 8
    assert stand.value("sequences") == 0


async def test_a_prompt_that_fails_leaves_the_other_alone() -> None:
    class Picky(FakeEngine):
        async def sample(self, request: SampleRequest) -> AsyncIterator[SampleChunk]:
            if request.token_ids == (7,):
                raise RuntimeError("no seven")
            async for chunk in super().sample(request):
                yield chunk

    replies = await sample(Stand(Picky()), max_tokens=1)

    assert {(r.prompt_id, r.finish_reason) for r in replies} == {
        ("a", pb.FINISH_REASON_LENGTH),
        ("b", pb.FINISH_REASON_ERROR),
    }
    assert [r.reason for r in replies if r.prompt_id == "b"] == ["the engine failed: no seven"]


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"temperature": -1.0}, "params.temperature: must be 0 or more"),
        ({"temperature": float("nan")}, "params.temperature: must be 0 or more"),
        ({"top_p": 0.0}, r"params.top_p: must be in \(0, 1\]"),
        ({"n": 4}, "prompts: 8 sequences exceed the limit max_samples=6"),
        ({"stop_strings": [""]}, "params.stop_strings: each must have"),
    ],
)
async def test_what_cannot_be_sampled_is_refused(params: dict[str, object], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        await sample(Stand(max_samples=6), **params)


async def test_sequences_of_all_callers_have_a_limit() -> None:
    with pytest.raises(Overloaded, match="max_running_samples=3"):
        await sample(Stand(max_running_samples=3), n=2, max_tokens=1)


async def test_a_slow_sampling_ends_at_its_deadline() -> None:
    stand = Stand(FakeEngine(seconds_per_token=0.05))
    request = pb.SampleRequest(prompts=[pb.SamplePrompt(token_ids=[1])])

    with pytest.raises(DeadlinePassed):
        [reply async for reply in stand.handlers.sample(request, 0.12)]
    assert stand.value("sequences") == 0


async def test_a_reader_that_leaves_frees_the_sampling() -> None:
    stand = Stand()
    request = pb.SampleRequest(
        prompts=[pb.SamplePrompt(token_ids=[1])], params=pb.SamplingParams(n=4)
    )
    samples = stand.handlers.sample(request, 5.0)
    await anext(samples)
    assert stand.value("sequences") == 4

    await samples.aclose()

    assert stand.value("sequences") == 0
    await stand.handlers.idle()
