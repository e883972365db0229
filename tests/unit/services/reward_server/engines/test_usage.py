"""Token counts of a scoring call: by hand, and against a brute-force set of prefixes."""

import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from services.reward_server.engines import AnswerIds, ScoreJob, Usage
from services.reward_server.engines.usage import Run, count_tokens


def answer(*ids: int, scored: tuple[int, int] | None = None) -> AnswerIds:
    start, end = scored or (0, len(ids))
    return AnswerIds(ids, start, end)


def test_one_rollout_counted_by_hand() -> None:
    # Prefixes 1 2 and 1 2 3 4 5; answer 7 8, of which 7 is an input and 8 only predicted.
    job = ScoreJob((1, 2, 3, 4, 5), (2, 5), (answer(7, 8, 9, scored=(1, 2)),))

    assert count_tokens([job]) == [Usage(tokens_total=3 + 6, tokens_unique=5 + 1 + 1)]


def test_no_jobs_have_no_usage() -> None:
    assert count_tokens([]) == []


def test_a_one_token_answer_adds_no_input_and_an_answer_may_run_along_the_next_turn() -> None:
    one_token = ScoreJob((1, 2, 3), (2, 3), (answer(3),))
    along = ScoreJob((1, 2, 3), (2, 3), (answer(3, 9),))

    assert count_tokens([one_token]) == [Usage(2 + 3, 3)]
    assert count_tokens([along]) == [Usage(3 + 4, 3 + 1)]


def test_what_two_rollouts_share_is_the_first_ones() -> None:
    prompt, ask = (1, 2, 3), (answer(7, 8),)
    first = ScoreJob((*prompt, 4), (3, 4), ask)
    second = ScoreJob((*prompt, 5), (3, 5 - 1), ask)
    twin = second

    assert count_tokens([first, second, twin]) == [Usage(4 + 5, 6), Usage(4 + 5, 2), Usage(9, 0)]


def test_cached_is_what_no_run_computed_and_a_position_run_twice_is_computed_twice() -> None:
    # One sequence of 6 inputs per prefix: 1..5 6 and 1..8 6. Blocks of 4: the first run found
    # one block from earlier calls, the second took that block and computed 5 and on again.
    job = ScoreJob((1, 2, 3, 4, 5, 6, 7, 8), (5, 8), (answer(9, 9),))
    first, second = Run(0, 0, 0, cached=4), Run(0, 1, 0, cached=4)

    (usage,) = count_tokens([job], [first, second])

    assert usage == Usage(
        tokens_total=6 + 9,
        tokens_unique=8 + 2,
        tokens_cached=4,
        tokens_computed=2 + 5,  # 5 9, and 5 6 7 8 9
    )
    assert usage.tokens_cached + usage.tokens_computed == usage.tokens_unique + 1  # 5, again


def test_a_block_that_an_earlier_run_of_the_call_left_is_not_cached() -> None:
    job = ScoreJob((1, 2, 3, 4, 5, 6), (4, 6), (answer(9),))

    (usage,) = count_tokens([job], [Run(0, 0, 0, cached=0), Run(0, 1, 0, cached=4)])

    assert usage == Usage(4 + 6, 6, tokens_cached=0, tokens_computed=6)


ids = st.integers(0, 2)


@st.composite
def score_jobs(draw: st.DrawFn) -> ScoreJob:
    token_ids = draw(st.lists(ids, min_size=1, max_size=12))
    ends = draw(st.sets(st.integers(1, len(token_ids)), min_size=1, max_size=4))
    answers = []
    for answer_ids in draw(st.lists(st.lists(ids, min_size=1, max_size=4), min_size=1, max_size=2)):
        end = draw(st.integers(1, len(answer_ids)))
        answers.append(AnswerIds(tuple(answer_ids), draw(st.integers(0, end - 1)), end))
    return ScoreJob(tuple(token_ids), tuple(sorted(ends)), tuple(answers))


def inputs(job: ScoreJob, prefix: int, answer_number: int) -> tuple[int, ...]:
    chosen = job.answers[answer_number]
    return job.token_ids[: job.prefix_ends[prefix]] + chosen.token_ids[: chosen.scored_end - 1]


def sequences(job: ScoreJob) -> list[tuple[int, int]]:
    return [(k, a) for k in range(len(job.prefix_ends)) for a in range(len(job.answers))]


@settings(max_examples=300, deadline=None)
@given(jobs=st.lists(score_jobs(), min_size=1, max_size=4), data=st.data())
def test_counts_equal_those_of_brute_force_sets_of_prefixes(
    jobs: list[ScoreJob], data: st.DataObject
) -> None:
    runs = [
        Run(j, k, a, cached=data.draw(st.integers(0, len(inputs(job, k, a)))))
        for j, job in enumerate(jobs)
        for k, a in sequences(job)
        if data.draw(st.booleans())
    ]
    touched = [(run, inputs(jobs[run.job], run.prefix, run.answer)) for run in runs]
    ran = {seq[:n] for run, seq in touched for n in range(run.cached + 1, len(seq) + 1)}
    needed = {seq[:n] for _, seq in touched for n in range(1, len(seq) + 1)}

    seen: set[tuple[int, ...]] = set()
    expected = []
    for j, job in enumerate(jobs):
        all_inputs = [inputs(job, k, a) for k, a in sequences(job)]
        own = {seq[:n] for seq in all_inputs for n in range(1, len(seq) + 1)} - seen
        computed = sum(len(seq) - run.cached for run, seq in touched if run.job == j)
        total = sum(map(len, all_inputs))
        expected.append(Usage(total, len(own), len((needed - ran) & own), computed))
        seen |= own

    assert count_tokens(jobs, runs) == expected


def test_hundreds_of_long_rollouts_are_counted_in_a_moment() -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(10, 50_000) for _ in range(1000)] for _ in range(32)]
    ends = tuple(range(1000, 8001, 700))
    answers = (answer(1, 2, 3, 4), answer(1, 2, 5))
    jobs = [
        ScoreJob((*prompt, *rng.choices(range(10, 50_000), k=7000)), ends, answers)
        for prompt in prompts
        for _ in range(8)
    ]
    started = time.process_time()
    usage = sum(count_tokens(jobs), Usage())

    # Inputs of the answers: 1 2 3. First tokens of two turns are rarely the same by chance.
    no_chance = 32 * 1000 + 256 * 7000 + (32 + 256 * 10) * 3
    assert no_chance - 10 < usage.tokens_unique <= no_chance
    assert time.process_time() - started < 3.0  # 0.2 s on an idle core
