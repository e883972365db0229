"""What goes wrong in one job stays there: bad weights, lack of memory, bugs, cancelled calls."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.reward_server.engines import ScoreResult
from services.reward_server.engines.model import Attend
from services.reward_server.engines.torch_engine import TorchEngine
from tests.scoring import SAME_ATOL, answer, check_plain, deviation, rollout, score
from tests.unit.services.reward_server.engines.conftest import SaveModel, StartEngine

BAD = 7  # smaller than the ids after the prompt: who names it is computed first
Forward = Callable[[torch.Tensor, torch.Tensor, Attend], torch.Tensor]
Poison = Callable[[str, float], Path]

PROMPT = (1, 2, 3, 4)
GOOD = [rollout([PROMPT, (10 + i, 20 + i), (30,)], answer(5, 6, 8)) for i in range(3)]
TAINTED = [
    rollout([PROMPT, (10, BAD), (30,)], answer(5, 6)),  # in a turn
    rollout([PROMPT, (11,)], answer(5), answer(BAD, 6)),  # an input of one alias
    rollout([(BAD,)], answer(5)),
]


@pytest.fixture
def poisoned(saved: SaveModel, tmp_path: Path) -> Poison:
    """Save the untied model with a bad value in row 7 of one of its tables."""

    def save(table: str, value: float) -> Path:
        path = saved(tied=False)
        tensors = load_file(path / "model.safetensors")
        tensors[table][BAD, 3] = value
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_text((path / "config.json").read_text())
        return tmp_path

    return save


@pytest.mark.parametrize(
    ("attention", "budget", "value"),
    [
        ("merged", 4, float("nan")),
        ("merged", 8192, float("nan")),
        ("merged", 8192, float("inf")),
        ("dense", 8192, float("nan")),
    ],
)
def test_a_bad_embedding_spoils_only_the_jobs_that_name_it(
    saved: SaveModel,
    start: StartEngine,
    poisoned: Poison,
    attention: str,
    budget: int,
    value: float,
) -> None:
    path = poisoned("model.embed_tokens.weight", value)
    engine = start(path, max_batch_tokens=budget, attention=attention)
    jobs = [TAINTED[0], GOOD[0], TAINTED[1], GOOD[1], TAINTED[2], GOOD[2]]
    for _ in ("cold", "warm"):
        result = score(engine, *jobs)

        assert [job.status for job in result.jobs] == ["ERROR", "OK"] * 3
        assert [job.logprobs for job in result.jobs[::2]] == [(), (), ()]
        assert "answer 0: log-prob nan is not a score" in result.jobs[0].reason
        check_plain(ScoreResult(result.jobs[1::2], 0, "trie"), GOOD, saved(tied=False))


async def test_a_bad_output_row_spoils_all_but_the_engine_recovers(
    saved: SaveModel, start: StartEngine, poisoned: Poison
) -> None:
    engine = start(poisoned("lm_head.weight", float("nan")))
    assert {job.status for job in (await engine.score(GOOD)).jobs} == {"ERROR"}

    await engine.load_weights(saved(tied=False), 1)
    check_plain(await engine.score(GOOD), GOOD, saved(tied=False))


def limit_forward(
    patch: pytest.MonkeyPatch, engine: TorchEngine, tokens: int, error: Exception
) -> list[int]:
    """Let a forward of more than so many tokens fail; return the sizes of those that ran."""
    forward: Forward = engine.model.forward
    sizes: list[int] = []

    def limited(ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        if len(ids) > tokens:
            raise error
        sizes.append(len(ids))
        return forward(ids, positions, attend)

    patch.setattr(engine.model, "forward", limited)
    return sizes


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu", "python"])
def test_out_of_memory_is_answered_with_smaller_passes(
    saved: SaveModel, start: StartEngine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine = start(saved(), max_batch_tokens=64)
    sizes = limit_forward(monkeypatch, engine, 12, error)

    check_plain(score(engine, *GOOD), GOOD, saved())
    assert 1 < max(sizes) <= 64 // 8


def test_a_job_that_fits_in_no_pass_is_an_error_and_the_others_finish(
    saved: SaveModel, start: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(saved(), max_batch_tokens=64)
    limit_forward(monkeypatch, engine, 12, OUT_OF_MEMORY[0])
    wide = rollout([PROMPT], answer(*range(20)))  # an answer is never cut
    result = score(engine, GOOD[0], wide, *GOOD[1:])

    assert [job.status for job in result.jobs] == ["OK", "ERROR", "OK", "OK"]
    assert "out of memory" in result.jobs[1].reason
    others = (result.jobs[0], *result.jobs[2:])
    check_plain(ScoreResult(others, 0, "trie"), GOOD, saved())

    monkeypatch.undo()
    check_plain(score(engine, wide), [wide], saved())


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, IndexError])
def test_whatever_fails_in_a_forward_is_an_error_and_leaves_nothing_half_done(
    saved: SaveModel, start: StartEngine, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    engine = start(saved())
    limit_forward(monkeypatch, engine, 0, kind("a bug"))
    result = score(engine, *GOOD)
    assert {(job.status, job.reason) for job in result.jobs} == {
        ("ERROR", "the engine failed: a bug")
    }

    monkeypatch.undo()
    check_plain(score(engine, *GOOD), GOOD, saved())


class Gate:
    """Stops an engine's forward passes until it is opened, and counts them."""

    def __init__(self, patch: pytest.MonkeyPatch, engine: TorchEngine) -> None:
        self.forward: Forward = engine.model.forward
        self.entered, self.open = threading.Event(), threading.Event()
        self.passes = 0
        patch.setattr(engine.model, "forward", self.wait)

    def wait(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        self.passes += 1
        self.entered.set()
        assert self.open.wait(timeout=20)
        return self.forward(ids, positions, attend)

    async def until_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 20)


async def test_a_cancelled_call_stops_and_the_others_finish(
    saved: SaveModel, start: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(saved(), max_batch_tokens=4)
    gate = Gate(monkeypatch, engine)
    many = [rollout([(i, 9), (8,)], answer(5, 6)) for i in range(50)]
    cancelled = asyncio.create_task(engine.score(many))
    await gate.until_entered()
    others = [asyncio.create_task(engine.score([job])) for job in GOOD]
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    gate.open.set()

    for job, other in zip(GOOD, others, strict=True):
        check_plain(await other, [job], saved())
    assert gate.passes < 50, "the cancelled call's other jobs were not computed"
    assert not any(run.transient for run in engine.trie.runs())
    check_plain(await engine.score(many[:3]), many[:3], saved())


async def test_the_same_job_scored_after_a_cancelled_one_has_the_same_scores(
    saved: SaveModel, start: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await start(saved()).score(GOOD)
    engine = start(saved())
    gate = Gate(monkeypatch, engine)
    tasks = [asyncio.create_task(engine.score(GOOD)) for _ in range(3)]
    await gate.until_entered()
    tasks[0].cancel()
    tasks[1].cancel()
    gate.open.set()

    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, asyncio.CancelledError) for result in results] == [True, True, False]
    last = await tasks[2]
    for ours, theirs in zip(last.jobs, expected.jobs, strict=True):
        assert deviation(ours.logprobs, theirs.logprobs) <= SAME_ATOL
