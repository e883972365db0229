"""Sampling: right tokens and log-probs, whoever else is sampled, and where a sequence ends."""

import asyncio
import random
import shutil
from pathlib import Path

import pytest
import torch

from services.reward_server.engines import SampleParams, SampleRequest, Usage
from tests.scoring import (
    Sampled,
    answer,
    check_plain,
    deviation,
    first_chunk,
    plain_scores,
    rollout,
    sample,
)
from tests.tiny_models import VOCAB, plain_model, save_word_tokenizer
from tests.unit.services.reward_server.engines.conftest import SaveModel, StartEngine

pytestmark = pytest.mark.slow  # `make check` stays under a minute without it

PROMPT = (3, 1, 4, 1, 5)


def ids_of(tokens: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=tokens)


def check_logprobs(path: Path, prompt: list[int] | tuple[int, ...], sampled: Sampled) -> None:
    for ids, logprobs in zip(sampled.ids, sampled.logprobs, strict=True):
        plain = plain_scores(path, rollout([prompt], answer(*ids)))
        assert deviation([[logprobs]], plain) <= 1e-4


def generated(path: Path, prompt: list[int], tokens: int) -> tuple[int, ...]:
    with torch.no_grad():
        out = plain_model(path).generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=tokens, pad_token_id=0
        )
    return tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
async def test_greedy_tokens_are_those_of_transformers(
    saved: SaveModel, start: StartEngine, family: str
) -> None:
    path = saved(family, tied=False)
    engine = start(path)
    prompts = [ids_of(n, seed=n) for n in (1, 9, 40)]
    got = await asyncio.gather(*(sample(engine, p, max_tokens=24, temperature=0) for p in prompts))

    for prompt, sampled in zip(prompts, got, strict=True):
        assert sampled.ids[0] == generated(path, prompt, 24)
        check_logprobs(path, prompt, sampled)


async def test_logprobs_are_those_of_the_raw_distribution(
    saved: SaveModel, start: StartEngine
) -> None:
    path = saved(tied=False)
    engine = start(path, max_batch_tokens=16)
    ways = [
        {"temperature": 1.0},
        {"temperature": 2.5},
        {"temperature": 0.3, "top_k": 5},
        {"top_p": 0.6},
    ]
    got = await asyncio.gather(
        *(sample(engine, PROMPT, max_tokens=20, n=3, seed=1, **way) for way in ways)
    )
    for sampled in got:
        check_logprobs(path, PROMPT, sampled)
        assert [len(ids) for ids in sampled.ids] == [20, 20, 20]


async def test_a_seeded_sequence_is_the_same_alone_and_in_a_crowd(
    saved: SaveModel, start: StartEngine
) -> None:
    path = saved()
    alone = await sample(start(path), PROMPT, max_tokens=40, seed=11)
    crowd = start(path, max_running=5, max_batch_tokens=32)
    got = await asyncio.gather(
        *(sample(crowd, ids_of(7 + i, i), max_tokens=10 + 3 * i) for i in range(6)),
        sample(crowd, PROMPT, max_tokens=40, seed=11),
        *(sample(crowd, PROMPT, max_tokens=10 + i) for i in range(6)),
    )
    assert got[6].ids == alone.ids


async def test_sequence_i_draws_from_the_seed_plus_i(saved: SaveModel, start: StartEngine) -> None:
    engine = start(saved())
    together = await sample(engine, PROMPT, max_tokens=12, seed=20, n=4)
    apart = [(await sample(engine, PROMPT, max_tokens=12, seed=20 + i)).ids[0] for i in range(4)]

    assert together.ids == apart
    assert len(set(together.ids)) == 4


async def test_without_a_seed_two_requests_differ(saved: SaveModel, start: StartEngine) -> None:
    engine = start(saved())
    first, second = [await sample(engine, PROMPT, max_tokens=20) for _ in range(2)]
    assert first.ids != second.ids


async def test_a_stop_id_ends_its_sequence_and_stays(saved: SaveModel, start: StartEngine) -> None:
    engine = start(saved())
    free = (await sample(engine, PROMPT, max_tokens=20, seed=4)).ids[0]
    stop = next(i for at, i in enumerate(free) if at >= 4 and i not in free[:at])
    stops = (max(set(range(VOCAB)) - set(free)), stop)
    sampled = await sample(engine, PROMPT, max_tokens=20, seed=4, stop_token_ids=stops)

    assert sampled.ids[0] == free[: free.index(stop) + 1]
    assert (sampled.finish, sampled.reasons) == (["stop"], [str(stop)])


async def test_a_stop_id_in_the_prompt_stops_nothing(saved: SaveModel, start: StartEngine) -> None:
    engine = start(saved())
    sampled = await sample(engine, (497, 3), max_tokens=3, seed=0, stop_token_ids=(497,))
    assert (len(sampled.ids[0]), sampled.finish) == (3, ["length"])


@pytest.mark.parametrize("kind", ["one word", "two words", "across a border"])
async def test_a_stop_string_ends_with_the_token_that_completes_it(
    saved: SaveModel, start: StartEngine, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "model"
    shutil.copytree(saved(), path)
    save_word_tokenizer(path)  # token i is the word w<i>
    engine = start(path)
    free = (await sample(engine, PROMPT, max_tokens=20, seed=4)).ids[0]
    words = [f"w{i}" for i in free]
    stop = {
        "one word": words[5],
        "two words": f"{words[5]} {words[6]} ",
        "across a border": f"{words[5][-1]} {words[6][:2]}",
    }[kind]
    # The first token with which the whole text has the stop string.
    length = next(n for n in range(1, 21) if stop in " ".join(words[:n]))
    sampled = await sample(engine, PROMPT, max_tokens=20, seed=4, stop_strings=("no such", stop))

    assert sampled.ids[0] == free[:length]
    assert (sampled.finish, sampled.reasons) == (["stop"], [stop])


async def test_the_models_length_ends_a_sequence(saved: SaveModel, start: StartEngine) -> None:
    engine = start(saved(max_position_embeddings=40))
    short = await sample(engine, ids_of(35, 1), max_tokens=99)
    full = await sample(engine, ids_of(40, 1), max_tokens=99, n=2)
    outside = await sample(engine, (1, VOCAB), max_tokens=2)

    assert (len(short.ids[0]), short.finish) == (5, ["length"])
    assert (full.ids, full.finish) == ([(), ()], ["error", "error"])
    assert "40" in full.reasons[0]
    assert (outside.ids, outside.finish) == ([()], ["error"])


async def test_more_requests_than_places_all_finish(saved: SaveModel, start: StartEngine) -> None:
    engine = start(saved(), max_running=3, max_batch_tokens=8)
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, len(engine.sampler.running))
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    got = await asyncio.gather(
        *(sample(engine, ids_of(4, i), max_tokens=1 + i, seed=i, n=2) for i in range(9))
    )
    watching.cancel()
    assert [[len(ids) for ids in one.ids] for one in got] == [[1 + i] * 2 for i in range(9)]
    assert 1 <= most <= 3


async def test_tokens_come_while_they_are_sampled(saved: SaveModel, start: StartEngine) -> None:
    chunks = start(saved()).sample(SampleRequest(PROMPT, SampleParams(max_tokens=40, seed=1)))
    got = [chunk async for chunk in chunks]

    assert len(got) > 1
    assert sum(len(chunk.token_ids) for chunk in got) == 40
    assert [chunk.finish_reason for chunk in got] == [None] * (len(got) - 1) + ["length"]


async def test_usage_counts_a_shared_prompt_once(saved: SaveModel, start: StartEngine) -> None:
    engine = start(saved())
    first = await sample(engine, PROMPT, max_tokens=4, n=2, seed=1)
    again = await sample(engine, (*PROMPT, 9), max_tokens=2, seed=1)

    # Of 4 sampled tokens 3 are inputs; the second sequence has the prompt of the first.
    assert [chunk.usage for chunk in first.last if chunk] == [
        Usage(5 + 3, 5 + 3, 0, 5 + 3),
        Usage(5 + 3, 3, 0, 3),
    ]
    assert [chunk.usage for chunk in again.last if chunk] == [Usage(6 + 1, 6 + 1, 5, 1 + 1)]


@pytest.mark.parametrize(("scored", "again"), [((1, 3), 0), ((0, 3), 1)])
async def test_scoring_what_was_just_sampled_computes_only_the_answers(
    saved: SaveModel, start: StartEngine, scored: tuple[int, int], again: int
) -> None:
    engine = start(saved())
    first = await sample(engine, PROMPT, max_tokens=10, seed=1)
    seen = (*PROMPT, *first.ids[0], 7, 8)  # the tool's answer
    second = await sample(engine, seen, max_tokens=10, seed=2)
    turns = [PROMPT, first.ids[0], (7, 8), second.ids[0]]
    job = rollout(turns, answer(60, 61, 62, scored=scored))
    result = await engine.score([job])

    check_plain(result, [job], saved())
    # Two answer inputs after each of four prefixes, and the last token, which was never fed.
    # Of the held prefix ends the first turn's is inside what was fed: its state was not kept.
    assert result.usage.tokens_computed == 4 * 2 + 1 + again
    assert result.usage.tokens_cached == len(job.token_ids) - 1


async def test_a_closed_stream_frees_its_sequences(saved: SaveModel, start: StartEngine) -> None:
    engine = start(saved())
    chunks = engine.sample(SampleRequest(PROMPT, SampleParams(max_tokens=4000, n=3)))
    await first_chunk(chunks)
    other = asyncio.create_task(sample(engine, PROMPT, max_tokens=30, seed=3))
    await chunks.aclose()  # type: ignore[attr-defined]

    assert (await other).finish == ["length"]
    async with asyncio.timeout(10):
        while engine.sampler.busy():
            await asyncio.sleep(0.01)
        await engine.load_weights(saved(), 1)
    assert engine.sampler.running == []
