"""Turn scoring jobs into vLLM requests: each (prefix, answer) once, in the order that shares.

vLLM reuses the blocks of earlier requests only. So rollouts of one question go one after the
other, and the prefixes of a rollout in ascending order: each finds the blocks of the one before.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from services.reward_server.engines import ScoreJob
from services.reward_server.engines.usage import Ids


class Use(NamedTuple):
    """Where a score goes: logprobs[prefix][answer] of a job."""

    job: int
    prefix: int
    answer: int


class PlannedRequest(NamedTuple):
    """Force the answer ids `forced` (up to a scored_end) after a prefix, for all its uses.

    The first use has exactly these ids; those of the others may be a beginning of them.
    """

    forced: tuple[int, ...]
    uses: tuple[Use, ...]


def plan_requests(jobs: Sequence[ScoreJob], numbers: Sequence[int]) -> list[PlannedRequest]:
    """Plan the jobs with these numbers, which `uses` then refer to."""
    by_prefix: dict[bytes, dict[tuple[int, ...], list[Use]]] = {}
    for number, ids in _by_question(jobs, numbers):
        job = jobs[number]
        for k, end in enumerate(job.prefix_ends):
            answers = by_prefix.setdefault(ids[:end].tobytes(), {})
            for a, answer in enumerate(job.answers):
                forced = answer.token_ids[: answer.scored_end]
                answers.setdefault(forced, []).append(Use(number, k, a))
    return [request for answers in by_prefix.values() for request in _longest(answers)]


def _by_question(jobs: Sequence[ScoreJob], numbers: Sequence[int]) -> list[tuple[int, Ids]]:
    """Bring jobs with the same first prefix together, otherwise in the given order."""
    questions: dict[bytes, list[tuple[int, Ids]]] = {}
    for number in numbers:
        ids = np.asarray(jobs[number].token_ids, np.int64)
        question = ids[: jobs[number].prefix_ends[0]].tobytes()
        questions.setdefault(question, []).append((number, ids))
    return [job for same in questions.values() for job in same]


def _longest(answers: dict[tuple[int, ...], list[Use]]) -> list[PlannedRequest]:
    """Let an answer that begins another one be scored along with the longer one."""
    planned: list[PlannedRequest] = []
    for forced in sorted(answers, reverse=True):  # what begins with `forced` comes before it
        uses = tuple(answers[forced])
        if planned and planned[-1].forced[: len(forced)] == forced:
            planned[-1] = planned[-1]._replace(uses=planned[-1].uses + uses)
        else:
            planned.append(PlannedRequest(forced, uses))
    return planned
