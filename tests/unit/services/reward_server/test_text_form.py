"""Chat messages -> ids, prefix ends and scored spans, with ids worked out by hand."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.reward_server.errors import InvalidRequest
from services.reward_server.requests import Limits
from services.reward_server.rest_models import TextPart
from services.reward_server.text_form import TextForm, to_answer
from tests.chat_tokenizer import (
    DOT_NEWLINE,
    END,
    FORGETFUL,
    IS,
    PARIS,
    SHARED_TOOLS,
    START,
    TWO_NEWLINES,
    make_tokenizer,
    plain,
)
from turnwise.errors import InvalidInput
from turnwise.v1 import reward_pb2 as pb

TOKENIZER = make_tokenizer()
HEAD = "<|im_start|>assistant\n<a>\n"


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def convert(
    *messages: dict[str, Any],
    answers: tuple[str, ...] = ("Paris",),
    tokenizer: Any = TOKENIZER,
    **limits: int,
) -> pb.Rollout:
    rollout = {"rollout_id": "r", "group_id": "g", "messages": messages, "answers": answers}
    request = TextPart.model_validate(
        {"rollouts": [rollout], "wrapper": {"head": HEAD, "tail": "\n</a>"}}
    )
    form = TextForm(tokenizer, request, Limits(**limits))
    return form.to_rollout(request.rollouts[0])


def message_ids(role: str, content: str) -> list[int]:
    name = [*plain("ass"), IS, *plain("tant")] if role == "assistant" else plain(role)
    return [START, *name, *plain(f"\n{content}"), END, *plain("\n")]


def test_a_prefix_ends_after_the_prompt_and_after_each_tool_response() -> None:
    rollout = convert(
        say("user", "q"), say("assistant", "s"), say("tool", "t"), say("assistant", "x")
    )

    user, call = message_ids("user", "q"), message_ids("assistant", "s")
    tool = message_ids("tool", "t")
    assert list(rollout.token_ids) == [*user, *call, *tool, *message_ids("assistant", "x")]
    assert list(rollout.prefix_ends) == [len(user), len(user + call + tool)] == [9, 31]
    assert (rollout.rollout_id, rollout.group_id) == ("r", "g")


def test_the_assistant_header_is_of_the_next_turn_and_not_the_policys() -> None:
    rollout = convert(say("user", "q"), say("assistant", "abc"), say("tool", "t"))

    (span,) = rollout.policy_spans
    header = len([START, *plain("ass"), IS, *plain("tant\n")])
    assert span.start == rollout.prefix_ends[0] + header
    assert list(rollout.token_ids[span.start : span.end]) == [*plain("abc"), END]


def test_a_trailing_tool_response_ends_a_prefix_of_its_own() -> None:
    assert len(convert(say("user", "q")).prefix_ends) == 1
    assert len(convert(say("user", "q"), say("assistant", "s")).prefix_ends) == 1
    rollout = convert(say("user", "q"), say("assistant", "s"), say("tool", "t"))
    assert len(rollout.prefix_ends) == 2
    assert rollout.prefix_ends[-1] == len(rollout.token_ids)


def test_only_the_answers_tokens_are_scored() -> None:
    (answer,) = convert(say("user", "q")).answers

    head, tail = TOKENIZER.encode(HEAD), TOKENIZER.encode("\n</a>")
    assert list(answer.token_ids) == [*head, PARIS, *tail]
    assert (answer.scored_start, answer.scored_end) == (len(head), len(head) + 1)


def test_tokens_that_overlap_the_answer_are_scored() -> None:
    whole = to_answer(TOKENIZER, "<a>\n", "Inc.", "\n</a>", "answers[0]")
    scored = list(whole.token_ids[whole.scored_start : whole.scored_end])
    assert scored == [*plain("Inc"), DOT_NEWLINE]

    blank = to_answer(TOKENIZER, "<a>\n", "\nx", "</a>", "answers[0]")
    scored = list(blank.token_ids[blank.scored_start : blank.scored_end])
    assert scored == [TWO_NEWLINES, *plain("x")]


def test_every_byte_of_a_letter_is_scored() -> None:
    answer = to_answer(TOKENIZER, "a", "é🎉", "b", "answers[0]")

    assert list(answer.token_ids) == plain("aé🎉b")
    assert (answer.scored_start, answer.scored_end) == (1, 7)


def test_tool_responses_in_a_row_may_share_a_block() -> None:
    rollout = convert(
        say("user", "q"),
        say("assistant", "s"),
        say("tool", "1"),
        say("tool", "2"),
        say("assistant", "x"),
        tokenizer=make_tokenizer(SHARED_TOOLS),
    )

    end = rollout.prefix_ends[1]
    assert TOKENIZER.decode(rollout.token_ids[:end]).endswith("user\n[1]\n[2]<|im_end|>\n")


def test_a_template_that_rewrites_a_turn_is_refused_and_the_turn_named() -> None:
    forgetful = make_tokenizer(FORGETFUL)
    messages = [
        say("user", "q"),
        say("assistant", "s"),
        say("tool", "t"),
        say("assistant", "u", reasoning_content="hm"),
        say("tool", "v"),
    ]

    problem = r"^messages\[3\] \(turn 2\): the chat template rewrites it when messages\[4\] follows"
    with pytest.raises(InvalidInput, match=problem):
        convert(*messages, tokenizer=forgetful)
    assert len(convert(*messages[:4], tokenizer=forgetful).prefix_ends) == 2


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    counting = make_tokenizer(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )

    with pytest.raises(
        InvalidInput, match=r"^messages\[0\] \(the prompt\): .*messages\[1\] follows"
    ):
        convert(say("user", "q"), say("assistant", "s"), tokenizer=counting)


def test_a_token_across_the_end_of_a_turn_is_refused() -> None:
    bare = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")

    assert len(convert(say("user", "q"), say("assistant", "s"), tokenizer=bare).prefix_ends) == 1
    with pytest.raises(
        InvalidInput, match=r"^messages\[0\] \(the prompt\): its last token is another"
    ):
        convert(say("user", "q\n"), say("assistant", "\ns"), tokenizer=bare)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "^messages: is empty"),
        ([say("assistant", "s")], r"^messages\[0\]: is the assistant's"),
        ([say("user", "q"), say("assistant", "s"), say("user", "q")], "max_prefixes=1"),
        ([say("user", "\ud800")], "no Unicode text"),
    ],
)
def test_messages_that_make_no_rollout_are_refused(
    messages: list[dict[str, Any]], problem: str
) -> None:
    with pytest.raises(InvalidInput, match=problem):
        convert(*messages, max_prefixes=1)


def test_an_answer_that_cannot_be_scored_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"^answers\[1\]: is empty"):
        convert(say("user", "q"), answers=("x", ""))
    with pytest.raises(InvalidInput, match="max_answers=1"):
        convert(say("user", "q"), answers=("x", "y"), max_answers=1)


def test_a_template_that_trips_over_a_message_says_where() -> None:
    strict = make_tokenizer("{% for m in messages %}{{ 1 // m.content|length }}{% endfor %}")
    with pytest.raises(
        InvalidInput, match=r"^messages\[0\]: the chat template fails there: .*zero"
    ):
        convert(say("user", ""), tokenizer=strict)


def test_a_tokenizer_without_chat_template_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no chat template: send token ids"):
        convert(say("user", "q"), tokenizer=make_tokenizer(None))


texts = st.text(st.sampled_from("Paris.\n é<|im_end|>") | st.characters(codec="utf-8"), max_size=12)


@given(st.lists(st.tuples(texts, texts), max_size=4), texts, texts.filter(bool))
def test_prefixes_are_what_the_template_makes_of_their_messages(
    turns: list[tuple[str, str]], question: str, answer: str
) -> None:
    messages = [say("user", question)]
    for call, response in turns:
        messages += [say("assistant", call), say("tool", response)]
    rollout = convert(*messages, answers=(answer,))

    for k, end in enumerate(rollout.prefix_ends):
        text = TOKENIZER.apply_chat_template(messages[: 2 * k + 1], tokenize=False)
        assert list(rollout.token_ids[:end]) == TOKENIZER.encode(text)
    assert len(rollout.prefix_ends) == len(turns) + 1
    own = [TOKENIZER.decode(rollout.token_ids[s.start : s.end]) for s in rollout.policy_spans]
    assert own == [call + "<|im_end|>" for call, _ in turns]
    (scored,) = rollout.answers
    ids = list(scored.token_ids[scored.scored_start : scored.scored_end])
    assert answer in TOKENIZER.decode(ids)
