"""Continuous batching: many sequences, one new token each per step, one forward for all.

Prompts are computed on the trie, so that rollouts of one question share theirs; their KV is
then copied into a slab with one row per running sequence. What a sequence computed goes back
to the trie when it ends, so that scoring it costs only the answers.
"""

import random
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from services.reward_server.engines import FinishReason, SampleParams, Usage
from services.reward_server.engines.attention import Attention
from services.reward_server.engines.choose import choose_tokens
from services.reward_server.engines.model import Attend, DecoderModel
from services.reward_server.engines.packing import Work, run_work
from services.reward_server.engines.trie import Ids, Trie, copy_path

EMIT_TOKENS = 16  # a sequence reports after this many new tokens, and when it ends
Decode = Callable[[list[int]], str]


class Sequence:
    """One continuation of a prompt: what was sampled so far and why it ended."""

    def __init__(self, prompt: Ids, params: SampleParams, index: int, max_tokens: int) -> None:
        self.prompt = prompt
        self.params = params
        self.index = index
        self.max_tokens = max_tokens
        self.draw = random.Random(None if params.seed is None else params.seed + index)  # noqa: S311
        self.stop_ids = frozenset(params.stop_token_ids)
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.emitted = 0
        self.finish: FinishReason | None = None
        self.reason = ""
        self.usage = Usage()
        self.cancelled = False

    def take(self, token: int, logprob: float, decode: Decode | None) -> None:
        """Append one sampled token and see whether the sequence ends with it."""
        if not -float("inf") < logprob <= 1e-6:
            self.finish, self.reason = "error", f"token {len(self.ids)} has log-prob {logprob}"
            return
        self.ids.append(token)
        self.logprobs.append(logprob)
        if token in self.stop_ids:
            self.finish, self.reason = "stop", str(token)
        elif self.params.stop_strings and decode and (stop := self._stop_string(decode)):
            self.finish, self.reason = "stop", stop
        elif len(self.ids) == self.max_tokens:
            self.finish = "length"

    def _stop_string(self, decode: Decode) -> str | None:
        # A token holds at least one byte, so a stop string of n bytes lies in the last n tokens.
        longest = max(len(stop.encode()) for stop in self.params.stop_strings)
        text = decode(self.ids[-longest:])
        return next((stop for stop in self.params.stop_strings if stop in text), None)


class Slab:
    """KV of the running sequences, one row each, grown by doubling; rows 0..len-1 are in use."""

    def __init__(self, model: DecoderModel) -> None:
        layers, _, heads, _, width = model.kv_shape.shape
        self.kv = model.kv_shape.new_zeros((layers, 2, 0, heads, 0, width))

    def fit(self, rows: int, tokens: int) -> None:
        """Make room for `rows` sequences of `tokens` tokens."""
        layers, two, held_rows, heads, held_tokens, width = self.kv.shape
        if rows <= held_rows and tokens <= held_tokens:
            return
        rows = max(rows, held_rows if rows <= held_rows else 2 * held_rows)
        tokens = max(tokens, held_tokens if tokens <= held_tokens else 2 * held_tokens)
        grown = self.kv.new_zeros((layers, two, rows, heads, tokens, width))
        grown[:, :, :held_rows, :, :held_tokens] = self.kv
        self.kv = grown

    def attend(self, lengths_B: torch.Tensor) -> Attend:
        """Attention of one new token per sequence, whose KV is stored first."""
        rows = torch.arange(len(lengths_B), device=lengths_B.device)
        longest = int(lengths_B.max()) + 1
        hidden_BM = torch.arange(longest, device=lengths_B.device) > lengths_B[:, None]
        bias_B11M = torch.zeros(hidden_BM.shape, dtype=self.kv.dtype, device=lengths_B.device)
        bias_B11M = bias_B11M.masked_fill_(hidden_BM, -float("inf"))[:, None, None]

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = self.kv[layer]
            keys[rows, :, lengths_B], values[rows, :, lengths_B] = k, v
            batch, heads, width = q.shape
            out = F.scaled_dot_product_attention(  # a key head's queries are its rows
                q.view(batch, k.shape[1], -1, width),
                keys[:batch, :, :longest],
                values[:batch, :, :longest],
                attn_mask=bias_B11M,
            )
            return out.reshape(batch, heads * width)

        return attend


class Sampler:
    """Runs in the engine's thread; `step` admits, samples one token for each, retires."""

    def __init__(
        self, model: DecoderModel, attention: Attention, trie: Trie, budget: int, max_running: int
    ) -> None:
        self.model, self.attention, self.trie = model, attention, trie
        self.budget, self.max_running = budget, max_running
        self.decode: Decode | None = None
        self.waiting: deque[Sequence] = deque()
        self.admitted: list[Sequence] = []  # their prompts are being computed
        self.running: list[Sequence] = []  # in slab row order
        self.lengths: list[int] = []  # tokens of each whose KV the slab holds
        self.slab = Slab(model)

    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[Sequence]:
        """Sample one token for every running sequence, new ones included; return who has news."""
        self._retire()
        hidden = [self._decode_step()] if self.running else []
        self.admitted = self._admit()
        if self.admitted:
            hidden.append(self._prefill(self.admitted))
            self.admitted = []
        if not hidden:
            return []
        drawn = choose_tokens(
            self.model, torch.cat(hidden), [(s.params, s.draw) for s in self.running]
        )
        for sequence, token, logprob in zip(self.running, *drawn, strict=True):
            sequence.take(token, logprob, self.decode)
        return [s for s in self.running if s.finish or len(s.ids) - s.emitted >= EMIT_TOKENS]

    def abandon(self) -> list[Sequence]:
        """Give up what a failed step was at; return whom that ends. Who waits, waits on."""
        affected = dict.fromkeys([*self.running, *self.admitted])
        self.running, self.lengths, self.admitted = [], [], []
        self.slab = Slab(self.model)
        return [sequence for sequence in affected if not sequence.finish]

    def _admit(self) -> list[Sequence]:
        admitted: list[Sequence] = []
        tokens = 0
        while self.waiting and len(self.running) + len(admitted) < self.max_running:
            if admitted and tokens >= self.budget:
                break
            sequence = self.waiting.popleft()
            if not sequence.cancelled:
                admitted.append(sequence)
                tokens += len(sequence.prompt)
        return admitted

    def _prefill(self, admitted: list[Sequence]) -> torch.Tensor:
        """Compute the prompts, copy their KV to the slab; return the last hidden states."""
        work = Work()
        rows = []
        for sequence in admitted:
            path = self.trie.walk((self.trie.root, 0), sequence.prompt)
            computed = sum(work.compute(run, stop) for run, _, stop in path)
            run, _, stop = path[-1]
            if stop <= run.computed and stop - 1 not in run.hidden:
                again = self.trie.repeat(run, stop - 1)
                computed += work.compute(again, 1)
                run, stop = again, 1
            rows.append(work.row(run, stop - 1))
            size = len(sequence.prompt)
            first = sequence.index == 0  # the n sequences of a request share their prompt
            sequence.usage = Usage(size, size, size - computed, computed) if first else Usage(size)
        hidden_RD = run_work(self.model, self.attention, work, self.budget)
        if len(admitted) > 1 and not hidden_RD.isfinite().all():
            return self._prefill_apart(admitted)
        longest = max(len(s.prompt) + min(s.max_tokens, 2 * EMIT_TOKENS) for s in admitted)
        self.slab.fit(len(self.running) + len(admitted), longest)
        for sequence in admitted:
            path = self.trie.walk((self.trie.root, 0), sequence.prompt)
            copy_path(path, self.slab.kv[:, :, len(self.running)], into_trie=False)
            self.running.append(sequence)
            self.lengths.append(len(sequence.prompt))
        self.trie.drop_transient()
        self.trie.evict()
        return hidden_RD[rows]

    def _prefill_apart(self, admitted: list[Sequence]) -> torch.Tensor:
        """A masked NaN spoils whoever it is computed with: each prompt alone, nothing shared."""
        hidden = []
        for sequence in admitted:
            self.trie.drop_transient()
            self.trie.evict(0)
            hidden.append(self._prefill([sequence]))
        return torch.cat(hidden)

    def _decode_step(self) -> torch.Tensor:
        """Feed every running sequence its last token; return the hidden states."""
        self.slab.fit(len(self.running), max(self.lengths) + 1)
        device = self.model.device
        lengths_B = torch.tensor(self.lengths, device=device)
        ids_B = torch.tensor([sequence.ids[-1] for sequence in self.running], device=device)
        states_BD = self.model.forward(ids_B, lengths_B, self.slab.attend(lengths_B))
        self.lengths = [length + 1 for length in self.lengths]
        return self.model.final_norm(states_BD)

    def _retire(self) -> None:
        """Take ended and cancelled sequences out; the last row of the slab fills the hole."""
        ended = [i for i, s in enumerate(self.running) if s.finish or s.cancelled]
        for row in reversed(ended):
            sequence, length = self.running[row], self.lengths[row]
            if sequence.finish == "error":
                # A masked NaN is a NaN again as soon as it meets the zero weight of its key.
                self.slab.kv[:, :, row] = 0
                self.trie.evict(0)
            else:
                self._keep(sequence, length, row)
            last = len(self.running) - 1
            if row != last:
                held = self.lengths[last]
                self.slab.kv[:, :, row, :, :held] = self.slab.kv[:, :, last, :, :held]
                self.running[row], self.lengths[row] = self.running[last], held
            del self.running[last], self.lengths[last]
        if ended:
            self.trie.evict()
        if not self.running:
            self.slab = Slab(self.model)

    def _keep(self, sequence: Sequence, length: int, row: int) -> None:
        """Hand a sequence's KV back to the trie, all but that of its last token."""
        ids = np.concatenate([sequence.prompt, np.asarray(sequence.ids, np.int32)])[:length]
        path = self.trie.walk((self.trie.root, 0), ids)
        copy_path(path, self.slab.kv[:, :, row], into_trie=True)


def report(sequence: Sequence) -> tuple[tuple[int, ...], tuple[float, ...], Usage]:
    """The tokens not reported yet, and the usage so far."""
    first, sequence.emitted = sequence.emitted, len(sequence.ids)
    inputs = max(len(sequence.ids) - 1, 0)  # the last token was never fed
    fed = Usage(inputs, inputs, 0, inputs)
    return tuple(sequence.ids[first:]), tuple(sequence.logprobs[first:]), sequence.usage + fed
