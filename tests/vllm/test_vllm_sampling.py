"""Sampling over vLLM: raw log-probs, whole token ids, seeds, stops, usage, one version."""

import asyncio
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from services.reward_server.engines import (
    Engine,
    SampleChunk,
    SampleParams,
    SampleRequest,
    Usage,
)
from tests.tiny_models import VOCAB, plain_logprobs
from tests.vllm.workloads import MAX_TOKENS, answer, assert_idle, rollout, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]


class Sequence:
    """The chunks of one sequence, joined."""

    def __init__(self, chunks: list[SampleChunk]) -> None:
        self.token_ids = tuple(i for chunk in chunks for i in chunk.token_ids)
        self.logprobs = [x for chunk in chunks for x in chunk.logprobs]
        self.sizes = [len(chunk.token_ids) for chunk in chunks]
        self.versions = {chunk.policy_version for chunk in chunks}
        self.finish_reason, self.reason = chunks[-1].finish_reason, chunks[-1].reason
        self.usage = chunks[-1].usage
        assert all(chunk.finish_reason is None for chunk in chunks[:-1])
        assert all(chunk.usage == Usage() for chunk in chunks[:-1])


async def sample(engine: Engine, prompt: tuple[int, ...], **params: Any) -> list[Sequence]:
    chunks: dict[int, list[SampleChunk]] = defaultdict(list)
    async for chunk in engine.sample(SampleRequest(prompt, SampleParams(**params))):
        chunks[chunk.index].append(chunk)
    return [Sequence(chunks[index]) for index in range(len(chunks))]


def raw_logprobs(model: Path, prompt: tuple[int, ...], sampled: tuple[int, ...]) -> list[float]:
    return plain_logprobs(model, prompt, sampled, 0, len(sampled))


@pytest.mark.parametrize(
    "how",
    [{"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.8, "top_k": 20}, {"temperature": 1.5}],
)
async def test_log_probs_are_those_of_the_raw_distribution_however_one_samples(
    tied_engine: Engine, tied_versions: list[Path], rng: random.Random, how: dict[str, Any]
) -> None:
    prompt = tokens(rng, 40)

    sequences = await sample(tied_engine, prompt, max_tokens=40, n=3, seed=11, **how)

    for sequence in sequences:
        assert (sequence.finish_reason, sequence.reason) == ("length", "")
        assert sequence.sizes == [1, 16, 16, 7]  # streamed
        assert sequence.versions == {0}
        expected = raw_logprobs(tied_versions[0], prompt, sequence.token_ids)
        assert sequence.logprobs == pytest.approx(expected, abs=1e-4)
    assert len({sequence.token_ids for sequence in sequences}) == (
        1 if how["temperature"] == 0 else 3
    )


async def test_sequence_i_draws_from_seed_plus_i_and_no_seed_draws_afresh(
    tied_engine: Engine, rng: random.Random
) -> None:
    prompt = tokens(rng, 20)

    three = await sample(tied_engine, prompt, max_tokens=12, n=3, seed=5)
    third = await sample(tied_engine, prompt, max_tokens=12, seed=7)
    fresh = await sample(tied_engine, prompt, max_tokens=12, n=2)

    assert three[2].token_ids == third[0].token_ids
    assert fresh[0].token_ids != fresh[1].token_ids


async def test_the_stop_token_stays_and_nothing_comes_after_it(
    untied_engine: Engine, rng: random.Random
) -> None:
    prompt = tokens(rng, 20)
    (free,) = await sample(untied_engine, prompt, max_tokens=30, seed=1)
    stop = next(i for i in free.token_ids[4:] if i not in free.token_ids[:4])

    (stopped,) = await sample(
        untied_engine, prompt, max_tokens=30, seed=1, stop_token_ids=(stop, VOCAB - 2)
    )

    end = free.token_ids.index(stop) + 1
    assert stopped.token_ids == free.token_ids[:end]
    assert stopped.logprobs == pytest.approx(free.logprobs[:end], abs=1e-5)
    assert (stopped.finish_reason, stopped.reason) == ("stop", str(stop))


async def test_a_stop_string_ends_with_the_token_that_completes_it_and_cuts_no_ids(
    tied_engine: Engine, rng: random.Random
) -> None:
    prompt = tokens(rng, 20)
    (free,) = await sample(tied_engine, prompt, max_tokens=30, seed=1)
    stop = f"w{free.token_ids[8]} w{free.token_ids[9]} "  # the last space is the next token's
    text = "".join(f" w{i}" for i in free.token_ids)
    completed = text[: text.index(stop) + len(stop)].count(" ")

    (stopped,) = await sample(
        tied_engine, prompt, max_tokens=30, seed=1, stop_strings=("nothing", stop)
    )

    assert stopped.token_ids == free.token_ids[:completed]
    assert len(stopped.logprobs) == completed
    assert (stopped.finish_reason, stopped.reason) == ("stop", stop)


async def test_what_cannot_be_sampled_is_said_in_one_chunk_per_sequence(
    tied_engine: Engine, untied_engine: Engine, rng: random.Random
) -> None:
    prompt = tokens(rng, 20)
    too_long = await sample(tied_engine, tokens(rng, MAX_TOKENS), max_tokens=1, n=2)
    no_tokenizer = await sample(untied_engine, prompt, max_tokens=1, stop_strings=("x",))
    no_token = await sample(untied_engine, (VOCAB,), max_tokens=1)
    too_hot = await sample(untied_engine, prompt, max_tokens=1, temperature=9.0)

    failed = [*too_long, *no_tokenizer, *no_token, *too_hot]
    assert [sequence.finish_reason for sequence in failed] == ["error"] * 5
    assert [sequence.token_ids for sequence in failed] == [()] * 5
    for sequence, said in zip(
        failed,
        ["limit of 2048", "limit of 2048", "need a tokenizer", "token id", "temperature"],
        strict=True,
    ):
        assert said in sequence.reason


async def test_a_sequence_ends_at_the_models_limit(tied_engine: Engine, rng: random.Random) -> None:
    (sequence,) = await sample(tied_engine, tokens(rng, MAX_TOKENS - 5), max_tokens=100)

    assert (len(sequence.token_ids), sequence.finish_reason) == (5, "length")


async def test_usage_has_the_prompt_once_and_scoring_finds_what_was_sampled(
    tied_engine: Engine, rng: random.Random
) -> None:
    prompt = tokens(rng, 100)

    sequences = await sample(tied_engine, prompt, max_tokens=33, n=3, seed=2)
    usage = sum((sequence.usage for sequence in sequences), Usage())
    again = await sample(tied_engine, prompt, max_tokens=33, n=1, seed=2)

    assert usage.tokens_total == 3 * (100 + 32)
    assert usage.tokens_unique == 100 + 3 * 32
    assert usage.tokens_cached == 0
    assert usage.tokens_computed == 100 + 32 + 2 * (4 + 32)  # 4 are past the last whole block
    assert again[0].usage == Usage(132, 132, tokens_cached=96, tokens_computed=36)

    turn = sequences[0].token_ids
    (score,) = (await tied_engine.score([rollout(prompt, [turn], answer(1, 2))])).jobs
    # The 132 inputs of sampling left four whole blocks; after the prompt, vLLM still runs the
    # four tokens past the third block (and 1), after the turn the five past the fourth (and 1).
    assert score.usage.tokens_computed == (4 + 1) + (5 + 1)
    assert score.usage.tokens_cached == 128 - 4


async def test_closing_the_stream_frees_the_work_inside_vllm_at_once(
    tied_engine: Engine, rng: random.Random
) -> None:
    request = SampleRequest(tokens(rng, 20), SampleParams(max_tokens=2000, n=4))

    stream = tied_engine.sample(request)
    chunks = [await anext(stream) for _ in range(8)]
    assert {chunk.finish_reason for chunk in chunks} == {None}
    assert tied_engine.info().cache_bytes > 0  # held by what runs
    await stream.aclose()  # type: ignore[attr-defined]

    await assert_idle(tied_engine)


async def test_a_consumer_that_stops_listening_holds_up_no_swap(
    tied_engine: Engine, rng: random.Random
) -> None:
    request = SampleRequest(tokens(rng, 20), SampleParams(max_tokens=200, n=2))
    stream = tied_engine.sample(request)
    await anext(stream)

    async with asyncio.timeout(20.0), tied_engine._lock.swapping():  # type: ignore[attr-defined]
        pass

    rest = [chunk async for chunk in stream]
    assert sum(chunk.finish_reason == "length" for chunk in rest) == 2
