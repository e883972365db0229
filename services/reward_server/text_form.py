"""Chat messages -> the ids form, with the policy's own tokenizer and chat template.

A rollout is rendered and tokenised once, as a whole; where a prefix ends is checked, never
guessed: what the template makes of the messages so far has to be what the whole begins with.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise, takewhile
from typing import Any

from jinja2 import TemplateError

from services.reward_server.errors import InvalidRequest
from services.reward_server.requests import Limits
from services.reward_server.rest_models import Message, TextPart, TextRollout
from turnwise.errors import InvalidInput
from turnwise.v1 import reward_pb2 as pb

# A template is code that runs on the caller's messages, and it may trip over them.
TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
ASSISTANT = "assistant"


class TokenizedText:
    """A text, its token ids, and the characters of each."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self._tokenizer = tokenizer
        self.text = text
        self.ids, offsets = tokenize(tokenizer, text)
        self._starts = [start for start, _ in offsets]
        self._ends = [end for _, end in offsets]
        special = frozenset(tokenizer.all_special_ids)
        self._special = [i for i, token_id in enumerate(self.ids) if token_id in special]

    def count(self, beginning: str) -> int | None:
        """How many ids make up this beginning of the text; None when its ids are others."""
        end = bisect_right(self._ends, len(beginning))
        start, ids = self._last_part(beginning, end)
        if ids == self.ids[start:end]:
            return end
        ids, _ = tokenize(self._tokenizer, beginning)
        return len(ids) if ids == self.ids[: len(ids)] else None

    def count_common(self, other: str, at_least: int) -> int:
        """How many ids this text and another begin with; `at_least` of them are known."""
        start, ids = self._last_part(other, at_least)
        return max(at_least, start + count_same(ids, self.ids[start:]))

    def _last_part(self, text: str, end: int) -> tuple[int, list[int]]:
        """Tokenise from the last special token before `end` on: no token reaches across it."""
        specials = bisect_left(self._special, end)
        start = self._special[specials - 1] if specials else 0
        ids, _ = tokenize(self._tokenizer, text[self._starts[start] if specials else 0 :])
        return start, ids

    def policy_end(self, start: int, end: int) -> int:
        """Where the policy stopped in [start, end): the white space after its last special token
        is the template's."""
        specials = bisect_left(self._special, end)
        last = self._special[specials - 1] if specials else -1
        if last < start or self.text[self._ends[last] : self._ends[end - 1]].strip():
            return end
        return last + 1


class TextForm:
    """What the rollouts of one call share: tokenizer, wrapper, tools, limits."""

    def __init__(self, tokenizer: Any, request: TextPart, limits: Limits) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InvalidRequest("this model's tokenizer has no chat template: send token ids")
        if not tokenizer.is_fast:
            raise InvalidRequest("this model's tokenizer gives no offsets: send token ids")
        self._tokenizer = tokenizer
        self._wrapper, self._tools = request.wrapper, request.tools
        self._limits = limits
        self._answers: dict[str, pb.Answer] = {}  # aliases of a question come with each rollout

    def to_rollout(self, text: TextRollout) -> pb.Rollout:
        """Raises InvalidInput that names the message or answer."""
        cuts = self._cuts(text.messages)
        limit = self._limits.max_answers
        if len(text.answers) > limit:
            problem = f"{len(text.answers)} exceed the limit max_answers={limit}"
            raise InvalidInput("answers", problem)
        answers = [self._answer(f"answers[{i}]", answer) for i, answer in enumerate(text.answers)]
        messages = [message.model_dump(exclude_unset=True) for message in text.messages]
        texts = {0: "", **{cut: self._render(messages[:cut]) for cut in cuts}}
        whole = TokenizedText(self._tokenizer, texts[len(messages)])
        ends = _cut_ends(whole, texts, text.messages)
        spans: list[pb.TokenSpan] = []
        for i, message in enumerate(text.messages):
            if message.role == ASSISTANT:
                opened = self._render(messages[:i], opened=True)
                start = whole.count_common(opened, ends[i])
                if start < ends[i + 1]:
                    end = whole.policy_end(start, ends[i + 1])
                    spans.append(pb.TokenSpan(start=start, end=end))
        return pb.Rollout(
            rollout_id=text.rollout_id,
            group_id=text.group_id,
            token_ids=whole.ids,
            prefix_ends=[ends[cut] for cut in cuts if ends_prefix(text.messages, cut)],
            answers=answers,
            policy_spans=spans,
        )

    def _cuts(self, messages: Sequence[Message]) -> list[int]:
        """After how many messages to look at the text: before and after each of the policy."""
        if not messages:
            raise InvalidInput("messages", "is empty")
        if messages[0].role == ASSISTANT:
            raise InvalidInput("messages[0]", "is the assistant's: what was its prompt?")
        own = [i for i, message in enumerate(messages) if message.role == ASSISTANT]
        cuts = sorted({*own, *(i + 1 for i in own), len(messages)})
        prefixes = sum(ends_prefix(messages, cut) for cut in cuts)
        if prefixes > (limit := self._limits.max_prefixes):
            problem = f"{prefixes} prefixes exceed the limit max_prefixes={limit}"
            raise InvalidInput("messages", problem)
        return cuts

    def _render(self, messages: Sequence[dict[str, Any]], *, opened: bool = False) -> str:
        """The template's text; `opened` adds the header that the policy goes on from."""
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tools=self._tools, tokenize=False, add_generation_prompt=opened
            )
        except TEMPLATE_ERRORS as error:
            cause = " ".join(str(error).split())
            place = f"messages[{len(messages) - 1}]"
            raise InvalidInput(place, f"the chat template fails there: {cause}") from error
        return text

    def _answer(self, place: str, answer: str) -> pb.Answer:
        if answer not in self._answers:
            self._answers[answer] = to_answer(
                self._tokenizer, self._wrapper.head, answer, self._wrapper.tail, place
            )
        return self._answers[answer]


def to_answer(tokenizer: Any, head: str, answer: str, tail: str, place: str) -> pb.Answer:
    """Tokenise an answer in its wrapper; every token that overlaps the answer is scored."""
    if not answer:
        raise InvalidInput(place, "is empty")
    ids, offsets = tokenize(tokenizer, head + answer + tail)
    first, last = len(head), len(head) + len(answer)
    scored = [i for i, (start, end) in enumerate(offsets) if start < end and start < last]
    scored = [i for i in scored if offsets[i][1] > first]
    if not scored:
        raise InvalidInput(place, f"{answer[:40]!r} has no token of its own in this wrapper")
    return pb.Answer(token_ids=ids, scored_start=scored[0], scored_end=scored[-1] + 1)


def ends_prefix(messages: Sequence[Message], cut: int) -> bool:
    """Whether the policy has its say after so many messages: the end of a prompt or a turn."""
    if cut == len(messages):
        return messages[-1].role != ASSISTANT
    return messages[cut].role == ASSISTANT


def count_same(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def tokenize(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and their characters; the template has written the special tokens already."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput("text", f"is no Unicode text: {error.reason}") from error
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return encoded["input_ids"], encoded["offset_mapping"]


def _cut_ends(
    whole: TokenizedText, texts: dict[int, str], messages: Sequence[Message]
) -> dict[int, int]:
    """How many ids each beginning has; refuse a template that changes what it wrote before."""
    for before, after in pairwise(texts):
        if not texts[after].startswith(texts[before]):
            same = count_same(texts[before], texts[after])
            changed = next(cut for cut in texts if len(texts[cut]) > same)
            problem = f"the chat template rewrites it when messages[{before}] follows"
            raise InvalidInput(_part(texts, changed, messages), problem)
    ends: dict[int, int] = {}
    for cut, text in texts.items():
        if (end := whole.count(text)) is None:
            problem = f"its last token is another when messages[{cut}] follows"
            raise InvalidInput(_part(texts, cut, messages), problem)
        ends[cut] = end
    return ends


def _part(texts: dict[int, str], cut: int, messages: Sequence[Message]) -> str:
    """Name the turn, and the first message of it, that ends at a cut."""
    cuts = list(texts)
    first = cuts[cuts.index(cut) - 1]
    turn = sum(message.role == ASSISTANT for message in messages[: first + 1])
    return f"messages[{first}] (turn {turn})" if turn else f"messages[{first}] (the prompt)"
