"""Outcomes: word-level F1 as published, and a format judged on what the policy itself said."""

from itertools import accumulate, chain, pairwise
from typing import Any

import pytest

from turnwise.errors import InvalidInput
from turnwise.outcome import (
    AnswerFormat,
    Judgement,
    exact_match,
    f1,
    judge,
    outcome,
    policy_texts,
)


def test_golden_f1_of_token_sets() -> None:
    city = f1("The New York, New York city", "New York City", "token_sets")
    assert city == pytest.approx(0.857143, abs=1e-6)
    assert f1("it's U.S.", "U.S.", "token_sets") == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("the U.S.", "US", 1.0),
        # "new york new york city" and "new york city": 3 words in common of 5 and 3.
        ("The New York, New York city", "New York City", 2 * 3 / 8),
        ("Paris, France", "Paris", 2 / 3),
        ("Rome", "Paris", 0.0),
        ("a  cat\nsat", "Cat sat!", 1.0),
        ("theatre", "atre", 0.0),  # an article is a word, not a prefix
        ("1,000", "1000", 1.0),
        ("an apple", "apple", 1.0),
        # A word counts as often as it stands in both: twice here, of 2 and 3.
        ("york york", "York, York city", 2 * 2 / 5),
    ],
)
def test_f1_as_squad_defines_it(prediction: str, answer: str, expected: float) -> None:
    assert f1(prediction, answer) == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["squad", "token_sets"])
def test_letters_beyond_ascii_are_kept(metric: Any) -> None:
    assert f1("Dvořák", "dvořák", metric) == 1.0
    assert f1("Dvořák", "Dvorak", metric) == 0.0
    assert f1("東京", "東京", metric) == 1.0


@pytest.mark.parametrize("metric", ["squad", "token_sets"])
def test_texts_without_words_match_only_each_other(metric: Any) -> None:
    assert f1("", "", metric) == f1("...", "?", metric) == 1.0
    assert f1("", "Paris", metric) == f1("Paris", "", metric) == 0.0


def test_exact_match_is_blind_to_case_articles_and_punctuation_only() -> None:
    assert exact_match("The Beatles.", "beatles") == 1.0
    assert exact_match("Beatles The", "beatles") == 1.0
    assert exact_match("New York York", "New York") == 0.0
    assert exact_match("York New", "New York") == 0.0


def test_the_best_alias_counts() -> None:
    judgement = Judgement(prediction="New York City")

    assert outcome(judgement, ["Boston", "New York", "NYC"]) == pytest.approx(0.8)
    # Neither token_sets ("u s") nor exact_match would see a word in common.
    assert outcome(Judgement(prediction="the US Army"), ["U.S."]) == pytest.approx(2 / 3)
    assert outcome(judgement, ["Boston", "new york city"], "exact_match") == 1.0
    assert outcome(judgement, ["city of New York"], "exact_match") == 0.0
    assert outcome(judgement, ["the New York City"], "token_sets") == pytest.approx(2 * 3 / 7)


def test_a_fault_costs_the_penalty_whatever_the_answers() -> None:
    fault = Judgement(fault="the answer is empty")

    assert outcome(fault, ["Paris"]) == -1.0
    assert outcome(fault, ["Paris"], format_penalty=-2.0) == -2.0


def test_no_answers_or_an_unknown_metric_is_refused() -> None:
    with pytest.raises(InvalidInput, match="answers: is empty"):
        outcome(Judgement(prediction="Paris"), [])
    with pytest.raises(InvalidInput, match=r"metric: .*squad, token_sets, exact_match"):
        outcome(Judgement(fault="none"), ["Paris"], "f1")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["sqad", "exact_match"])
def test_f1_has_its_own_modes_and_no_other(mode: Any) -> None:
    with pytest.raises(InvalidInput, match=r"^mode: .* allowed are squad, token_sets;"):
        f1("Paris", "Paris", mode)


def test_a_well_formed_answer_is_the_prediction() -> None:
    assert judge(["<think>hm</think><answer>\nParis \n</answer>"]) == Judgement(prediction="Paris")
    assert judge(["search", "<answer>Paris</answer>\n<|im_end|>\n"]).prediction == "Paris"
    assert judge(["<answer>1 < 2</answer>"]).prediction == "1 < 2"


@pytest.mark.parametrize("ending", ["<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>"])
def test_the_end_of_a_text_may_follow_the_answer(ending: str) -> None:
    assert judge([f"<answer>Paris</answer>{ending}\n"]).prediction == "Paris"


@pytest.mark.parametrize(
    ("texts", "fault"),
    [
        ([], "the policy said nothing"),
        (["I think it is Paris"], "the last turn has no <answer>"),
        (["<answer>Paris</answer>", "more"], "before the last turn"),
        (["</answer>", "<answer>Paris</answer>"], "before the last turn"),
        (["<answer>Rome</answer><answer>Paris</answer>"], "2 <answer> and 2 </answer>"),
        (["<answer><answer>Paris</answer>"], "2 <answer> and 1 </answer>"),
        (["<answer>Paris"], "1 <answer> and 0 </answer>"),
        (["Paris</answer>"], "0 <answer> and 1 </answer>"),
        (["</answer>Paris<answer>"], "</answer> stands before <answer>"),
        (["<answer> \n</answer>"], "the answer is empty"),
        (["<answer>Paris</answer> or Rome"], "text follows </answer>"),
        (["<answer>Paris</answer><|im_end|>x"], "text follows </answer>"),
    ],
)
def test_a_fault_says_what_is_wrong(texts: list[str], fault: str) -> None:
    judgement = judge(texts)

    assert judgement.prediction is None
    assert fault in str(judgement.fault)


def test_another_format_has_its_own_tag_and_endings() -> None:
    boxed = AnswerFormat(tag="final", endings=("[end]",))

    assert judge(["<answer>no</answer> <final>Paris</final>[end]"], boxed).prediction == "Paris"
    assert "text follows" in str(judge(["<final>Paris</final><|im_end|>"], boxed).fault)


Part = tuple[str, bool]


def spoken(*turns: list[Part]) -> list[str]:
    """The policy texts after a prompt, where tokens are characters; True marks what it said."""
    parts: list[Part] = [("Q?", False), *chain.from_iterable(turns)]
    ids = list(chain.from_iterable(map(ord, text) for text, _ in parts))
    mask = list(chain.from_iterable([policy] * len(text) for text, policy in parts))
    ends = [*accumulate((sum(len(text) for text, _ in turn) for turn in turns), initial=2)]
    return policy_texts(ids, mask, [*pairwise(ends)], lambda tokens: "".join(map(chr, tokens)))


def test_each_run_of_policy_tokens_is_a_text_of_its_own() -> None:
    said = spoken([("look", True), ("result", False)], [("it is", True), (" x", True)])

    assert said == ["look", "it is x"]


def test_turns_are_texts_of_their_own_without_a_tool_response_between_them() -> None:
    said = spoken([("<ans", True)], [("wer>Paris</answer>", True)])

    assert said == ["<ans", "wer>Paris</answer>"]
    assert judge(said).prediction is None


def test_a_tool_response_has_no_influence_whatever_it_holds() -> None:
    for response in ("found", "<answer>Rome</answer>", "<code>", "</answer>", "<answer>"):
        search = [("<search>", True), (response, False)]
        assert judge(spoken(search, [("<answer>Paris</answer>", True)])).prediction == "Paris"

        unanswered = judge(spoken(search))
        assert unanswered.fault == "the last turn has no <answer>"


def test_a_tag_split_by_a_tool_response_is_no_tag() -> None:
    said = spoken([("<ans", True), ("found", False), ("wer>Paris</answer>", True)])

    assert judge(said).prediction is None


def test_tokens_and_mask_must_have_one_length() -> None:
    with pytest.raises(InvalidInput, match="policy_mask: holds 1 values for 2 tokens"):
        policy_texts([1, 2], [True], [(0, 1)], str)
