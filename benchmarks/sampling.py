"""Sampling many sequences at once: our continuous batching against a plain padded batch.

The padded sampler is what a script for one small model does: all prompts of one length, a
static cache, every sequence stepping in lockstep, nothing ever joining or leaving.
"""

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from services.reward_server.engines import SampleParams, SampleRequest
from services.reward_server.engines.torch_engine import TorchEngine

SEQUENCES, PROMPT, NEW, VOCAB = 128, 24, 96, 270


def make_tiny_policy(directory: Path) -> Path:
    """The shape of the fictional world's policy: width 128, 3 layers, 4 heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


class PaddedSampler:
    """Lockstep sampling over a Llama's weights with a static cache of [B, H, T, W] per layer."""

    def __init__(self, directory: Path) -> None:
        hf = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.inner, self.config = hf.model, hf.config
        self.layers = [
            (
                layer,
                torch.cat([getattr(layer.self_attn, f"{x}_proj").weight for x in "qkv"]),
                torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
            )
            for layer in hf.model.layers
        ]

    def sample(self, prompts_BT: torch.Tensor, new: int) -> torch.Tensor:
        batch, length = prompts_BT.shape
        heads = self.config.num_attention_heads
        width = self.config.hidden_size // heads
        shape = (2, batch, heads, length + new, width)
        caches = [torch.zeros(shape) for _ in self.layers]
        ids_BT, start, out = prompts_BT, 0, []
        for _ in range(new):
            logits_BV = self._forward(ids_BT, start, caches)
            start += ids_BT.shape[1]
            ids_BT = torch.multinomial(logits_BV.softmax(-1), 1)
            logprobs_B = logits_BV.log_softmax(-1).gather(1, ids_BT)[:, 0]
            out.append((ids_BT[:, 0].tolist(), logprobs_B.tolist()))
        return torch.tensor([ids for ids, _ in out]).T

    def _forward(
        self, ids_BT: torch.Tensor, start: int, caches: list[torch.Tensor]
    ) -> torch.Tensor:
        batch, length = ids_BT.shape
        stop = start + length
        x = F.embedding(ids_BT, self.inner.embed_tokens.weight)
        cos, sin = self.inner.rotary_emb(x, torch.arange(start, stop)[None])
        cos, sin = cos[:, None], sin[:, None]
        eps, size = self.config.rms_norm_eps, x.shape[-1:]
        for (layer, qkv_weight, gate_up_weight), cache in zip(self.layers, caches, strict=True):
            normed = F.rms_norm(x, size, layer.input_layernorm.weight, eps)
            qkv = F.linear(normed, qkv_weight).view(batch, length, 3, -1, cache.shape[-1])
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            q, k = (
                part * cos + torch.cat([-part.chunk(2, -1)[1], part.chunk(2, -1)[0]], -1) * sin
                for part in (q, k)
            )
            cache[0, :, :, start:stop], cache[1, :, :, start:stop] = k, v
            keys, values = cache[:, :, :, :stop]
            out = F.scaled_dot_product_attention(q, keys, values, is_causal=length > 1)
            x = x + layer.self_attn.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
            normed = F.rms_norm(x, size, layer.post_attention_layernorm.weight, eps)
            gate, up = F.linear(normed, gate_up_weight).chunk(2, -1)
            x = x + layer.mlp.down_proj(F.silu(gate) * up)
        last = F.rms_norm(x[:, -1], size, self.inner.norm.weight, eps)
        return F.linear(last, self.inner.embed_tokens.weight)


async def ours(engine: TorchEngine, prompts: np.ndarray, together: int) -> float:
    """Tokens per second of our engine with at most `together` requests under way."""
    gate = asyncio.Semaphore(together)

    async def one(prompt: tuple[int, ...]) -> int:
        async with gate:
            request = SampleRequest(prompt, SampleParams(max_tokens=NEW))
            return sum([len(chunk.token_ids) async for chunk in engine.sample(request)])

    start = time.perf_counter()
    counts = await asyncio.gather(*[one(tuple(row.tolist())) for row in prompts])
    return sum(counts) / (time.perf_counter() - start)


async def measure(folder: Path) -> list[dict[str, Any]]:
    directory = make_tiny_policy(folder / "policy")
    draw = np.random.default_rng(0)
    prompts = draw.integers(0, VOCAB, (SEQUENCES, PROMPT))
    padded_sampler, engine = PaddedSampler(directory), TorchEngine(directory)
    rates: dict[str, list[float]] = {"padded": [], "together": [], "one by one": []}
    for _ in range(3):  # in turn, so that a noisy minute hits all alike
        start = time.perf_counter()
        padded_sampler.sample(torch.from_numpy(prompts), NEW)
        rates["padded"].append(SEQUENCES * NEW / (time.perf_counter() - start))
        rates["together"].append(await ours(engine, prompts, SEQUENCES))
        rates["one by one"].append(await ours(engine, prompts[:8], 1))
    await engine.close()
    best = {name: max(values) for name, values in rates.items()}
    return [
        {
            "sequences": SEQUENCES,
            "new tokens": NEW,
            "tokens/s": best["together"],
            "of padded lockstep": best["together"] / best["padded"],
            "of one by one": best["together"] / best["one by one"],
        }
    ]


def rows(folder: Path) -> list[dict[str, Any]]:
    with torch.inference_mode():
        return asyncio.run(measure(folder))
