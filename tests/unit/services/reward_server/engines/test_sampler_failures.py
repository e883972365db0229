"""A sequence that fails ends with finish_reason error, and the engine samples on."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.reward_server.engines.torch_engine import TorchEngine
from tests.scoring import answer, check_plain, rollout, sample
from tests.unit.services.reward_server.engines.conftest import SaveModel, StartEngine

BAD = 77
PROMPT = (3, 1, 4, 1, 5)


def fail_forward(patch: pytest.MonkeyPatch, engine: TorchEngine, at: int, error: Exception) -> None:
    """Let one forward of the model fail, counted from now."""
    forward = engine.model.forward
    calls = 0

    def fails_once(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return forward(*args)

    patch.setattr(engine.model, "forward", fails_once)


@pytest.mark.parametrize("at", [1, 5], ids=["prompt", "decoding"])
@pytest.mark.parametrize("error", [RuntimeError("broken"), ValueError("broken")])
async def test_a_failure_in_a_step_ends_its_sequences_and_the_engine_goes_on(
    saved: SaveModel,
    start: StartEngine,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    error: Exception,
) -> None:
    engine = start(saved())
    alone = await sample(engine, PROMPT, max_tokens=20, seed=5)
    fail_forward(monkeypatch, engine, at, error)
    got = await asyncio.gather(
        *(sample(engine, (*PROMPT, i), max_tokens=20, seed=i, n=2) for i in range(3))
    )
    # The six came at once: they were in the failing step together.
    assert [one.finish for one in got] == [["error", "error"]] * 3
    assert {reason for one in got for reason in one.reasons} == {"the engine failed: broken"}

    assert (await sample(engine, PROMPT, max_tokens=20, seed=5)).ids == alone.ids
    job = rollout([PROMPT, (8, 9)], answer(6, 7))
    check_plain(await engine.score([job]), [job], saved())


async def test_who_waits_for_a_place_is_not_hurt_by_a_failure(
    saved: SaveModel, start: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(saved(), max_running=2)
    fail_forward(monkeypatch, engine, 5, RuntimeError("broken"))
    got = await asyncio.gather(
        *(sample(engine, (*PROMPT, i), max_tokens=20, seed=i) for i in range(5))
    )
    assert [one.finish for one in got] == [["error"], ["error"], *[["length"]] * 3]


async def test_a_sequence_that_ended_before_a_failure_is_not_told_twice(
    saved: SaveModel, start: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(saved())
    free = await sample(engine, PROMPT, max_tokens=20, seed=0, n=2)
    stop = next(i for i in free.ids[0] if i not in free.ids[1])
    while engine.sampler.busy():  # until those two have retired
        await asyncio.sleep(0.001)
    keep = engine.sampler._keep

    def fails(*args: Any) -> None:  # as when the cache cannot grow while a sequence retires
        monkeypatch.setattr(engine.sampler, "_keep", keep)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.sampler, "_keep", fails)
    ended = await sample(engine, PROMPT, max_tokens=20, seed=0, n=2, stop_token_ids=(stop,))

    assert ended.finish == ["stop", "error"]


@pytest.fixture
def poisoned(saved: SaveModel, tmp_path: Path) -> Path:
    """The untied model with NaN in the embedding of token 77."""
    path = saved(tied=False)
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][BAD] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    return tmp_path


async def test_nan_logits_end_that_sequence_only(
    saved: SaveModel, start: StartEngine, poisoned: Path
) -> None:
    healthy, engine = start(saved(tied=False)), start(poisoned, max_running=4)
    long_and_bad = (*[9] * 60, BAD)
    asked: list[dict[str, Any]] = [{"max_tokens": 30, "seed": i} for i in range(3)]
    expected = [await sample(healthy, PROMPT, **one) for one in asked]
    # Four places: those that come later are given the places of the bad ones, NaN and all.
    got = await asyncio.gather(
        sample(engine, (*[9] * 90, 8), max_tokens=60, seed=1),
        *(sample(engine, long_and_bad, max_tokens=5) for _ in range(3)),
        *(sample(engine, PROMPT, **one) for one in asked),
    )
    bad, good = got[1:4], got[4:]

    assert [one.finish for one in bad] == [["error"]] * 3
    assert [one.ids for one in bad] == [[()]] * 3
    assert "log-prob nan" in bad[0].reasons[0]
    assert got[0].finish == ["length"]
    assert [one.ids for one in good] == [one.ids for one in expected]


async def test_closing_the_engine_ends_what_is_being_sampled(
    saved: SaveModel, start: StartEngine
) -> None:
    engine = start(saved(), max_running=1)
    streams = [asyncio.create_task(sample(engine, PROMPT, max_tokens=4000)) for _ in range(2)]
    while not engine.sampler.running:
        await asyncio.sleep(0)
    await engine.close()

    assert [(await stream).finish for stream in streams] == [["error"], ["error"]]
    assert (await streams[0]).reasons == ["the engine was closed"]


@pytest.mark.parametrize("attention", ["merged", "dense"])
@pytest.mark.parametrize("together", [True, False])
async def test_nan_in_one_prompt_does_not_spoil_another_that_shares_its_beginning(
    saved: SaveModel, start: StartEngine, poisoned: Path, attention: str, together: bool
) -> None:
    expected = await sample(start(saved(tied=False)), PROMPT, max_tokens=5, seed=1)
    engine = start(poisoned, attention=attention)
    engine._thread.submit(time.sleep, 0.05)  # both wait before the first step
    bad = asyncio.create_task(sample(engine, (*PROMPT, BAD), max_tokens=5))
    while not engine.sampler.waiting:
        await asyncio.sleep(0)
    if not together:
        await bad
    good = await sample(engine, PROMPT, max_tokens=5, seed=1)

    assert (await bad).finish == ["error"]
    assert good.ids == expected.ids
