"""A byte-level tokenizer with a chat template, small enough to work out its ids by hand.

Ids 0 and 1 are the turn tokens, byte b is 2 + b, and each merge below is one more id. Nothing
splits words, so a merge happens wherever its two parts meet.
"""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|im_start|>", "<|im_end|>")
# "Ċ" stands for a newline.
MERGES = (("i", "s"), ("P", "a"), ("Pa", "r"), ("Par", "is"), (".", "Ċ"), ("Ċ", "Ċ"), ("is", "Ċ"))
START, END, IS, PARIS, DOT_NEWLINE, TWO_NEWLINES = 0, 1, 258, 261, 262, 263
VOCAB = 2 + 256 + len(MERGES)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Qwen3: what was thought is shown in the newest message alone.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
)
# Tool responses in a row share one block, closed after the last of them.
SHARED_TOOLS = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}"
    "{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}{{ '\n' }}[{{ m.content }}]"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(template: str | None = CHATML) -> Any:
    # GPT-2's order of bytes is not that of the bytes: ask how each of them is written.
    written = bytes_written()
    vocab = {token: i for i, token in enumerate(SPECIAL)}
    vocab |= {letter: 2 + byte for byte, letter in enumerate(written)}
    vocab |= {first + second: 258 + i for i, (first, second) in enumerate(MERGES)}
    tokenizer = Tokenizer(BPE(vocab, list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[1], additional_special_tokens=[SPECIAL[0]]
    )
    fast.chat_template = template
    return fast


def bytes_written() -> list[str]:
    """How a byte-level tokenizer writes byte 0..255."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


def plain(text: str) -> list[int]:
    """Ids of a text in which nothing merges."""
    return [2 + byte for byte in text.encode()]
