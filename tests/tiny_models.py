"""Tiny random models on disk, and the plain transformers forward that engines must agree with."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM

Family = Literal["qwen2", "qwen3", "llama", "mistral"]

VOCAB = 499  # no multiple of anything: an engine that pads its vocabulary must hide it
LOGIT_STD = 3.0  # far from uniform, so that wrong tokens or wrong context show as whole nats


def save_tiny_model(
    directory: Path | str,
    family: Family = "qwen2",
    seed: int = 0,
    tied: bool = True,
    *,
    vocab: int = VOCAB,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Save a random model (config.json and model.safetensors) and return its directory.

    Grouped-query attention with heads of 32 (the smallest vLLM's CPU attention takes). Every
    parameter is random, also biases and norms: one that an engine forgets changes the result.
    """
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "sliding_window": None,
    }
    config = AutoConfig.for_model(family, **{**settings, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomize(model, seed)
    model.to(dtype).save_pretrained(directory)
    return Path(directory)


def _randomize(model: torch.nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # a tied lm_head comes once, as embedding
            noise = torch.randn(weight.shape, generator=draw)
            if weight.dim() == 1:
                weight.copy_(0.2 * noise + (1.0 if "norm" in name else 0.0))
            elif "embed_tokens" in name or "lm_head" in name:
                weight.copy_(LOGIT_STD * noise / weight.shape[1] ** 0.5)
            else:
                weight.copy_(noise / weight.shape[1] ** 0.5)


def save_word_tokenizer(directory: Path | str, vocab: int = VOCAB) -> None:
    """Save a tokenizer that decodes token i to " w<i>", as stop strings need it.

    For qwen2, transformers takes a byte-level class whatever the file says: it does not encode
    such words, and it wants its special token, which is the last of the vocabulary here.
    """
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    words = {f"Ġw{i}": i for i in range(vocab - 1)} | {end: vocab - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token=end))
    tokenizer.decoder = ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(directory)


@cache
def plain_model(directory: Path | str) -> Any:
    """The model in fp32 with eager attention; kept, so never rewrite a directory."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def plain_logprobs(
    model_dir: Path | str,
    prefix_ids: Sequence[int],
    answer_ids: Sequence[int],
    scored_start: int,
    scored_end: int,
) -> list[float]:
    """Log-probs (nats) of answer_ids[scored_start:scored_end], by one forward over all ids."""
    ids = torch.tensor([[*prefix_ids, *answer_ids]])
    with torch.no_grad():
        logits_TV = plain_model(Path(model_dir))(ids, use_cache=False).logits[0].float()
    logprobs_TV = logits_TV.log_softmax(-1)
    first, end = len(prefix_ids) + scored_start, len(prefix_ids) + scored_end
    return [float(logprobs_TV[t - 1, ids[0, t]]) for t in range(first, end)]
