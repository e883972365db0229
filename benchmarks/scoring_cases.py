"""Workloads of the scoring benchmark, what they cost in FLOPs, and plain ways to score them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from services.reward_server.engines import AnswerIds, ScoreJob
from services.reward_server.engines.attention import merged
from services.reward_server.engines.model import DecoderModel
from services.reward_server.engines.trie import Trie
from services.reward_server.engines.trie_scorer import Chunk

PROMPT, ANSWER = 300, 12
SHAPES = {
    "5M": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 5,
           "num_attention_heads": 4, "num_key_value_heads": 2},
    "60M": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 4,
            "num_attention_heads": 14, "num_key_value_heads": 2},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One question: G rollouts of T turns of S tokens; T + 1 scored prefixes each."""

    turns: int
    rollouts: int
    turn_tokens: int

    def __str__(self) -> str:
        return f"T{self.turns} G{self.rollouts} S{self.turn_tokens}"

    def jobs(self, vocab: int, seed: int = 0) -> list[ScoreJob]:
        draw = np.random.default_rng(seed)

        def ids(count: int) -> tuple[int, ...]:
            return tuple(draw.integers(0, vocab, count).tolist())

        prompt, answer = ids(PROMPT), AnswerIds(ids(ANSWER), 0, ANSWER)
        ends = tuple(PROMPT + turn * self.turn_tokens for turn in range(self.turns + 1))
        return [
            ScoreJob(prompt + ids(self.turns * self.turn_tokens), ends, (answer,))
            for _ in range(self.rollouts)
        ]


def make_model(directory: Path, shape: str, vocab: int) -> Path:
    """Save a random model whose output is not uniform."""
    config = Qwen2Config(
        vocab_size=vocab, max_position_embeddings=32_768, tie_word_embeddings=True, **SHAPES[shape]
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            std = 0.08 if "embed" in name else weight.shape[1] ** -0.5
            torch.nn.init.normal_(weight, 0.0, std)
    model.save_pretrained(directory)
    return directory


def sequences(jobs: list[ScoreJob]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Every prefix with its answer, as a plain service is asked for them."""
    for job in jobs:
        for end in job.prefix_ends:
            yield end, job.token_ids[:end] + job.answers[0].token_ids


@dataclass(frozen=True)
class Flops:
    """Multiply-adds times two: products with weights, the head, attention scores and values."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        return self.linear + self.attention


def flops(model: DecoderModel, case: Case, shared: bool) -> Flops:
    """What the case costs with every trie token once, or with one pass per prefix."""
    config = model.config
    width = model.heads * model.width
    kv = model.key_heads * model.width
    per_layer = config.hidden_size * (2 * width + 2 * kv + 3 * config.intermediate_size)
    turns, size, inputs = case.turns, case.turn_tokens, ANSWER - 1
    lengths = [PROMPT + turn * size for turn in range(turns + 1)]
    if shared:
        tokens = PROMPT + case.rollouts * turns * size
        pairs = triangle(PROMPT) + case.rollouts * (triangle(lengths[-1]) - triangle(PROMPT))
        answers = [PROMPT] + [end for end in lengths[1:] for _ in range(case.rollouts)]
    else:
        tokens = case.rollouts * sum(lengths)
        pairs = case.rollouts * sum(map(triangle, lengths))
        answers = lengths * case.rollouts
    tokens += inputs * len(answers)
    pairs += sum(inputs * end for end in answers) + len(answers) * triangle(inputs)
    head = ANSWER * len(answers) * config.vocab_size * config.hidden_size
    return Flops(
        2.0 * (tokens * per_layer * config.num_hidden_layers + head),
        4.0 * pairs * width * config.num_hidden_layers,
    )


def triangle(count: int) -> int:
    return count * (count + 1) // 2


def trie_scores(model: DecoderModel, jobs: list[ScoreJob], budget: int = 8192) -> np.ndarray:
    """The packed trie, cold."""
    trie = Trie(0)
    scores = []
    rest = list(jobs)
    while rest:
        chunk = Chunk(trie, 1)
        while rest and chunk.tokens < budget:
            chunk.add(rest.pop(0))
        scores += [job.logprobs for job in chunk.score(model, merged, budget)]
        trie.drop_transient()
    return np.array(scores)


def streamed_scores(model: DecoderModel, jobs: list[ScoreJob]) -> np.ndarray:
    """As the rollouts unfold: one call per turn and rollout, on a warm cache."""
    trie = Trie(8 << 30)
    scores: list[list[Any]] = [[] for _ in jobs]
    for k in range(len(jobs[0].prefix_ends)):
        for job, row in zip(jobs, scores, strict=True):
            chunk = Chunk(trie, 1)
            chunk.add(ScoreJob(job.token_ids, job.prefix_ends[k : k + 1], job.answers))
            row.append(chunk.score(model, merged, 8192)[0].logprobs[0])
            trie.drop_transient()
    return np.array(scores)


def own_naive_scores(model: DecoderModel, jobs: list[ScoreJob]) -> np.ndarray:
    """Our own forward, one pass per prefix, nothing shared."""
    scores = []
    for job in jobs:
        for end in job.prefix_ends:
            chunk = Chunk(Trie(0), 1)
            chunk.add(ScoreJob(job.token_ids, (end,), job.answers))
            scores.append(chunk.score(model, merged, 1 << 20)[0].logprobs[0])
    return np.array(scores).reshape(len(jobs), -1, 1, ANSWER)


class HuggingFace:
    """transformers as a scoring service would use it."""

    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def naive_scores(self, jobs: list[ScoreJob]) -> np.ndarray:
        """One forward per prefix, full logits, log-softmax of all of them."""
        scores = []
        for end, ids in sequences(jobs):
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            scores.append(picked(logits.log_softmax(-1)[end - 1 : -1], ids[end:]))
        return np.array(scores).reshape(len(jobs), -1, 1, ANSWER)

    def padded_scores(self, jobs: list[ScoreJob], batch: int = 16) -> np.ndarray:
        """Left-padded batches with the right positions; logits of the answers only."""
        scores = []
        rows = list(sequences(jobs))
        for first in range(0, len(rows), batch):
            part = [ids for _, ids in rows[first : first + batch]]
            longest = max(map(len, part))
            ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in part])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in part])
            logits = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=ANSWER + 1,
            ).logits
            for row, answer in zip(logits.log_softmax(-1), part, strict=True):
                scores.append(picked(row[:-1], answer[-ANSWER:]))
        return np.array(scores).reshape(len(jobs), -1, 1, ANSWER)


def picked(logprobs_LV: torch.Tensor, ids: tuple[int, ...]) -> list[float]:
    values: list[float] = logprobs_LV.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
    return values
