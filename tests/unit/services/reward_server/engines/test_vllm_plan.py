"""The plan of vLLM requests: nothing twice, in the order in which blocks are shared."""

from services.reward_server.engines import AnswerIds, ScoreJob
from services.reward_server.engines.vllm_plan import (
    PlannedRequest,
    Use,
    plan_requests,
)


def answer(*ids: int, end: int | None = None) -> AnswerIds:
    return AnswerIds(ids, 0, end or len(ids))


def test_rollouts_of_one_question_come_together_and_prefixes_ascend() -> None:
    first, second = answer(8), answer(9)
    jobs = [
        ScoreJob((1, 2, 3, 4), (2, 4), (first,)),
        ScoreJob((5, 6, 3, 4), (2, 4), (second,)),  # another question in between
        ScoreJob((1, 2, 7), (2, 3), (first,)),
    ]

    assert plan_requests(jobs, [0, 1, 2]) == [
        PlannedRequest((8,), (Use(0, 0, 0), Use(2, 0, 0))),  # their prompt, once
        PlannedRequest((8,), (Use(0, 1, 0),)),
        PlannedRequest((8,), (Use(2, 1, 0),)),
        PlannedRequest((9,), (Use(1, 0, 0),)),
        PlannedRequest((9,), (Use(1, 1, 0),)),
    ]


def test_only_ids_up_to_the_scored_end_are_asked_for_and_left_out_jobs_are_left_out() -> None:
    jobs = [ScoreJob((1,), (1,), (answer(4),)), ScoreJob((1,), (1,), (answer(5, 6, 7, end=2),))]

    assert plan_requests(jobs, [1]) == [PlannedRequest((5, 6), (Use(1, 0, 0),))]


def test_an_answer_that_begins_another_is_scored_along_with_it() -> None:
    answers = (answer(4, 5), answer(4), answer(6), answer(4, 5, 9, end=2), answer(4, 5, 7))

    assert plan_requests([ScoreJob((1,), (1,), answers)], [0]) == [
        PlannedRequest((6,), (Use(0, 0, 2),)),
        PlannedRequest((4, 5, 7), (Use(0, 0, 4), Use(0, 0, 0), Use(0, 0, 3), Use(0, 0, 1))),
    ]
