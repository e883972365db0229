"""Score a chunk of jobs on the trie: place every prefix and answer, compute, read the log-probs."""

from collections.abc import Sequence

import numpy as np
import torch

from services.reward_server.engines import AnswerIds, JobScore, ScoreJob, Usage
from services.reward_server.engines.attention import Attention
from services.reward_server.engines.model import DecoderModel
from services.reward_server.engines.packing import Work, run_work
from services.reward_server.engines.trie import Ids, Place, Segment, Trie, place_after

MAX_SCORE = 1e-6  # a log-prob above this, or not finite, is not a score


class Counter:
    """Counts what one job found cached and had computed; shared positions go to the first."""

    def __init__(self, call: int, work: Work) -> None:
        self.call = call
        self.work = work
        self.cached = self.computed = 0

    def add(self, path: Sequence[Segment]) -> None:
        for run, _, stop in path:
            if run.call != self.call:
                run.call, run.known = self.call, 0
            self.cached += max(0, min(stop, run.computed) - run.known)
            run.known = max(run.known, stop)
            self.computed += self.work.compute(run, stop)

    def again(self) -> None:
        """A position whose KV is held, but not its hidden state, is computed once more."""
        self.computed += 1

    def usage(self) -> Usage:
        return Usage(tokens_cached=self.cached, tokens_computed=self.computed)


class Chunk:
    """Jobs scored together; `add` them until it says enough, then `score`."""

    def __init__(self, trie: Trie, call: int) -> None:
        self.trie = trie
        self.call = call
        self.work = Work()
        self.jobs: list[tuple[ScoreJob, list[Segment], Counter]] = []
        self.tokens = 0  # new ones, with an upper bound for the answers

    def add(self, job: ScoreJob) -> int:
        """Place a job's context in the trie; return how many new tokens the chunk has now."""
        ids = as_ids(job.token_ids[: job.prefix_ends[-1]])
        counter = Counter(self.call, self.work)
        path = self.trie.walk((self.trie.root, 0), ids)
        counter.add(path)
        self.jobs.append((job, path, counter))
        answers = len(job.prefix_ends) * sum(answer.scored_end - 1 for answer in job.answers)
        self.tokens += counter.computed + answers
        return self.tokens

    def score(self, model: DecoderModel, attention: Attention, budget: int) -> list[JobScore]:
        """Compute the chunk in forward passes of at most about `budget` tokens."""
        asked: dict[tuple[int, int, AnswerIds], list[int]] = {}  # -> rows, one per scored token
        for job, path, counter in self.jobs:
            self._ask(job, path, counter, asked)
        hidden_RD = run_work(model, attention, self.work, budget)
        rows = [row for answer_rows in asked.values() for row in answer_rows]
        targets = [i for _, _, a in asked for i in a.token_ids[a.scored_start : a.scored_end]]
        order = np.argsort(rows, kind="stable")
        sorted_P = model.logprobs(
            hidden_RD,
            torch.from_numpy(np.asarray(rows)[order]).to(model.device),
            torch.from_numpy(np.asarray(targets)[order]).to(model.device),
        )
        logprobs = np.empty(len(rows))
        logprobs[order] = sorted_P.double().cpu().numpy()
        ends = np.cumsum([len(answer_rows) for answer_rows in asked.values()])[:-1]
        found = dict(zip(asked, (tuple(x.tolist()) for x in np.split(logprobs, ends)), strict=True))
        return [self._result(job, path, counter, found) for job, path, counter in self.jobs]

    def _ask(
        self,
        job: ScoreJob,
        path: list[Segment],
        counter: Counter,
        asked: dict[tuple[int, int, AnswerIds], list[int]],
    ) -> None:
        for end in job.prefix_ends:
            place = place_after(path, end)
            for answer in job.answers:
                key = (id(place[0]), place[1], answer)
                if key not in asked:
                    asked[key] = self._rows(place, answer, counter)

    def _rows(self, place: Place, answer: AnswerIds, counter: Counter) -> list[int]:
        """Rows of the hidden states that predict the scored tokens of an answer at a place."""
        inputs = as_ids(answer.token_ids[: answer.scored_end - 1])
        path = self.trie.walk(place, inputs, transient=True)
        counter.add(path)
        inner = [(run, offset) for run, start, stop in path for offset in range(start, stop)]
        before = [(place[0], place[1] - 1), *inner]  # before[i] predicts answer token i
        rows = []
        for run, offset in before[answer.scored_start : answer.scored_end]:
            if offset < run.computed and offset not in run.hidden:
                again = self.trie.repeat(run, offset)
                if self.work.compute(again, 1):
                    counter.again()
                rows.append(self.work.row(again, 0))
            else:
                rows.append(self.work.row(run, offset))
        return rows

    def _result(
        self,
        job: ScoreJob,
        path: list[Segment],
        counter: Counter,
        found: dict[tuple[int, int, AnswerIds], tuple[float, ...]],
    ) -> JobScore:
        logprobs = []
        for k, end in enumerate(job.prefix_ends):
            run, offset = place_after(path, end)
            scores = tuple(found[id(run), offset, answer] for answer in job.answers)
            for a, values in enumerate(scores):
                for value in values:
                    if not value <= MAX_SCORE or value == float("-inf"):
                        reason = f"prefix {k}, answer {a}: log-prob {value} is not a score"
                        return JobScore("ERROR", reason, usage=counter.usage())
            logprobs.append(scores)
        return JobScore("OK", "", tuple(logprobs), counter.usage())


def as_ids(token_ids: Sequence[int]) -> Ids:
    return np.asarray(token_ids, dtype=np.int32)
