"""The one check engines make themselves: length and vocabulary."""

from services.reward_server.engines import AnswerIds, SampleParams, SampleRequest, ScoreJob
from services.reward_server.engines.limits import why_invalid, why_not_sampled


def answer(*ids: int, end: int | None = None) -> AnswerIds:
    return AnswerIds(ids, 0, end or len(ids))


def test_a_job_fits_up_to_the_limit_counted_with_the_longest_scored_answer() -> None:
    job = ScoreJob((1, 2, 3, 4), (2, 3), (answer(5), answer(5, 6, 7, 8, end=3)))

    assert why_invalid(job, max_tokens=6, vocab_size=9) == ""
    assert why_invalid(job, max_tokens=5, vocab_size=9) == (
        "6 tokens with the answer exceed the limit of 5"
    )
    assert why_invalid(job, max_tokens=6, vocab_size=8) == (
        "token id 8 is outside the vocabulary of 8"
    )


def test_a_prompt_must_leave_room_for_a_token() -> None:
    request = SampleRequest((1, 2, 3), SampleParams(max_tokens=5))

    assert why_not_sampled(request, max_tokens=4, vocab_size=4) == ""
    assert why_not_sampled(request, max_tokens=3, vocab_size=4) == (
        "a prompt of 3 tokens leaves no room under the limit of 3"
    )
    assert why_not_sampled(request, max_tokens=4, vocab_size=3) == (
        "token id 3 is outside the vocabulary of 3"
    )
