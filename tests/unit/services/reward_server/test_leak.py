"""The leak flag: prompt and the policy's own earlier text count, tool responses do not."""

from services.reward_server.engines import ScoreJob
from services.reward_server.leak import Span, answer_leaked
from tests.scoring import answer

#        prompt   | policy | tool       | policy (after the last prefix)
IDS = (10, 11, 12, 20, 21, 30, 31, 32, 40, 41)
ENDS = (3, 8)
POLICY = ((3, 5), (8, 10))


def leaked(*ids: int, spans: tuple[Span, ...] = POLICY) -> bool:
    return answer_leaked(ScoreJob(IDS, ENDS, (answer(*ids),)), spans)


def test_the_answer_in_the_prompt_leaks() -> None:
    assert leaked(11, 12)
    assert leaked(11, 12, spans=())


def test_the_answer_in_what_the_policy_wrote_leaks_where_that_is_known() -> None:
    assert leaked(20, 21)
    assert not leaked(20, 21, spans=())


def test_the_answer_in_a_tool_response_is_what_the_search_was_for() -> None:
    assert not leaked(30, 31)


def test_an_answer_across_prompt_and_turn_or_turn_and_tool_is_no_one_s_text() -> None:
    assert not leaked(12, 20)
    assert not leaked(21, 30)


def test_what_comes_after_the_last_prefix_is_the_prediction() -> None:
    assert not leaked(40, 41)


def test_only_the_scored_span_counts() -> None:
    wrapped = answer(99, 11, 12, 98, scored=(1, 3))

    assert answer_leaked(ScoreJob(IDS, ENDS, (answer(97), wrapped)), ())
    assert not answer_leaked(ScoreJob(IDS, ENDS, (answer(11, 12, 98),)), ())


def test_bytes_that_straddle_ids_are_no_match() -> None:
    # 1 << 8 and 0 in bytes: 00 01 00 00 | 00 00 00 00; the id 1 begins at its second byte.
    job = ScoreJob((1 << 8, 0), (2,), (answer(1),))

    assert not answer_leaked(job, ())
