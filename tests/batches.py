"""Hypothesis strategies for batches of scoring jobs that share as much as they can."""

from hypothesis import strategies as st

from services.reward_server.engines import AnswerIds, ScoreJob
from tests.scoring import rollout

# Few ids, so that prompts, turns and answers meet each other; the last is the vocabulary's last.
ids = st.sampled_from([0, 7, 250, 498])
turns = st.lists(ids, min_size=1, max_size=4)


@st.composite
def answers(draw: st.DrawFn) -> AnswerIds:
    """Wrapper head, answer of at least one token, wrapper tail."""
    head, scored, tail = (draw(st.lists(ids, max_size=2)) for _ in range(3))
    scored = scored or [draw(ids)]
    return AnswerIds((*head, *scored, *tail), len(head), len(head) + len(scored))


@st.composite
def jobs_like(draw: st.DrawFn, prompts: list[list[int]], pool: list[AnswerIds]) -> ScoreJob:
    chosen = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=3))
    more = draw(st.lists(turns, max_size=4))
    return rollout([draw(st.sampled_from(prompts)), *more], *chosen)


def cut(job: ScoreJob, prefixes: int) -> ScoreJob:
    """The job's first prefixes only."""
    ends = job.prefix_ends[:prefixes]
    return ScoreJob(job.token_ids[: ends[-1]], ends, job.answers)


@st.composite
def batches(draw: st.DrawFn, max_jobs: int = 5) -> list[ScoreJob]:
    """Rollouts of one or two questions; twins; rollouts that end early; answers that nest."""
    prompts = draw(st.lists(st.lists(ids, min_size=1, max_size=6), min_size=1, max_size=2))
    pool = draw(st.lists(answers(), min_size=1, max_size=2))
    longer = (*pool[0].token_ids, draw(ids))
    pool.append(AnswerIds(longer, pool[0].scored_start, len(longer)))
    jobs = [draw(jobs_like(prompts, pool))]
    while len(jobs) < max_jobs and draw(st.integers(0, 3)):
        if draw(st.integers(0, 2)):
            jobs.append(draw(jobs_like(prompts, pool)))
        else:
            earlier = draw(st.sampled_from(jobs))
            jobs.append(cut(earlier, draw(st.integers(1, len(earlier.prefix_ends)))))
    return jobs
