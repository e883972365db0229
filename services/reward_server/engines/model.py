"""A decoder-only transformer over a flat axis of packed tokens; attention is passed in.

Weights, rotary embedding and activation come from an unmodified Hugging Face checkpoint. What
this forward cannot do exactly is refused when it is loaded, never approximated.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

# Shapes: N packed tokens, R rows, D model width, H heads, K key heads, W head width, V vocabulary.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # the others change with the total length
HEAD_ROWS = 64  # rows of logits at a time: 39 MB at 151,936 tokens
MLP_ROWS = {"cpu": 256, "cuda": 16_384}  # keeps the wide activation in the processor's cache


class UnsupportedModel(ValueError):
    """The checkpoint needs something this engine cannot compute exactly."""


class Linear:
    """x @ weight.T + bias, with the weight pre-packed by oneDNN where that was measured faster."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, packed: bool) -> None:
        self.bias = bias
        self.packed = packed
        self.weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if packed else weight
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self.weight, self.bias, "none", [], ""
            )
            return y
        return F.linear(x, self.weight, self.bias)


class Layer:
    """The weights of one decoder layer, with the products that share an input joined."""

    def __init__(self, hf_layer: Any, packed: bool) -> None:
        attention, mlp = hf_layer.self_attn, hf_layer.mlp
        self.input_norm = hf_layer.input_layernorm.weight
        self.mlp_norm = hf_layer.post_attention_layernorm.weight
        self.qkv = joined(packed, attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = joined(packed, attention.o_proj)
        self.gate_up = joined(packed, mlp.gate_proj, mlp.up_proj)
        self.down = joined(packed, mlp.down_proj)
        self.q_norm = attention.q_norm.weight if hasattr(attention, "q_norm") else None
        self.k_norm = attention.k_norm.weight if hasattr(attention, "k_norm") else None


class DecoderModel:
    """Loads a checkpoint and runs it; knows nothing of tries, caches or requests."""

    def __init__(self, directory: Path, dtype: torch.dtype | None, device: torch.device) -> None:
        self.config = config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        self.max_tokens = check_supported(config)
        hf, loading = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype or "auto",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
        if loading["missing_keys"] or loading["mismatched_keys"]:
            lacking = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
            raise UnsupportedModel(f"{directory} lacks usable weights for {lacking[0]}")
        hf = hf.eval().requires_grad_(False).to(device)
        inner = hf.model
        self.device, self.dtype = device, inner.embed_tokens.weight.dtype
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps, self.vocab_size = config.rms_norm_eps, config.vocab_size
        self.embedding = inner.embed_tokens.weight
        self.norm = inner.norm.weight
        self.rotary, self.activation = inner.rotary_emb, inner.layers[0].mlp.act_fn
        packed = packing_is_faster(inner.layers[0].mlp.gate_proj.weight)
        # Half precision heads are multiplied in fp32 blocks instead: see logits().
        self.head = Linear(hf.lm_head.weight, None, packed and self.dtype == torch.float32)
        self.layers = []
        for hf_layer in inner.layers:
            self.layers.append(Layer(hf_layer, packed))
            hf_layer.self_attn = hf_layer.mlp = None  # free what was copied, layer by layer
        self.kv_shape = torch.empty(
            (len(self.layers), 2, self.key_heads, 0, self.width), dtype=self.dtype, device=device
        )
        self.parameters = hf.num_parameters()

    def empty_hidden(self, rows: int) -> torch.Tensor:
        """Rows to fill; one that never was is NaN, so that nobody takes it for a number."""
        shape = (rows, self.embedding.shape[1])
        return torch.full(shape, float("nan"), dtype=self.dtype, device=self.device)

    def forward(
        self, ids_N: torch.Tensor, positions_N: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Return the last layer's output of every packed token, before the final norm."""
        x_ND = F.embedding(ids_N, self.embedding)
        cos_1NW, sin_1NW = self.rotary(x_ND[None], positions_N[None])
        cos_N1W, sin_N1W = cos_1NW[0, :, None], sin_1NW[0, :, None]
        split = [self.heads, self.key_heads, self.key_heads]
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(self._rms(x_ND, layer.input_norm)).view(len(x_ND), -1, self.width)
            q, k, v = torch.split(qkv, split, dim=1)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = self._rms(q, layer.q_norm), self._rms(k, layer.k_norm)
            q, k = rotate(q, cos_N1W, sin_N1W), rotate(k, cos_N1W, sin_N1W)
            x_ND += layer.out(attend(index, q, k, v))
            self._add_mlp(x_ND, layer)
        return x_ND

    def _add_mlp(self, x_ND: torch.Tensor, layer: Layer) -> None:
        for rows in torch.split(x_ND, MLP_ROWS[self.device.type]):
            gate, up = layer.gate_up(self._rms(rows, layer.mlp_norm)).chunk(2, dim=-1)
            rows.add_(layer.down(self.activation(gate).mul_(up)))

    def _rms(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), weight, self.eps)
        # As the checkpoints were trained: normalise in fp32, round, then scale.
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * weight

    def final_norm(self, x_RD: torch.Tensor) -> torch.Tensor:
        return self._rms(x_RD, self.norm)

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """Next-token logits in fp32, whatever the weights are stored in."""
        if self.dtype == torch.float32:
            return self.head(hidden_RD)
        if self.device.type == "cuda":
            return torch.mm(hidden_RD, self.head.weight.T, out_dtype=torch.float32)
        wide_RD = hidden_RD.float()
        blocks = [wide_RD @ block.float().T for block in torch.split(self.head.weight, 16_384)]
        return torch.cat(blocks, dim=-1)

    def logprobs(
        self, hidden_RD: torch.Tensor, rows_P: torch.Tensor, targets_P: torch.Tensor
    ) -> torch.Tensor:
        """Log-prob of target token p after row rows_P[p]; rows_P is ascending."""
        out_P = torch.empty(len(rows_P), dtype=torch.float32, device=self.device)
        for first in range(0, len(hidden_RD), HEAD_ROWS):
            bounds = torch.tensor([first, first + HEAD_ROWS], device=self.device)
            low, high = torch.searchsorted(rows_P, bounds).tolist()
            logits_RV = self.logits(hidden_RD[first : first + HEAD_ROWS])
            normaliser_R = logits_RV.logsumexp(-1)
            rows = rows_P[low:high] - first
            out_P[low:high] = logits_RV[rows, targets_P[low:high]] - normaliser_R[rows]
        return out_P

    def bytes(self) -> int:
        """Memory of the weights."""
        linears = [w for x in self.layers for w in (x.qkv, x.out, x.gate_up, x.down)]
        tensors = [self.embedding, *(linear.weight for linear in linears)]
        if self.head.packed or self.head.weight is not self.embedding:
            tensors.append(self.head.weight)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def rotate(x_NHW: torch.Tensor, cos_N1W: torch.Tensor, sin_N1W: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions."""
    first, second = x_NHW.chunk(2, dim=-1)
    return x_NHW * cos_N1W + torch.cat([-second, first], dim=-1) * sin_N1W


def joined(packed: bool, *parts: Any) -> Linear:
    """One product for several projections of the same input."""
    weight = torch.cat([part.weight for part in parts]) if len(parts) > 1 else parts[0].weight
    biases = [part.bias for part in parts]
    if all(bias is None for bias in biases):
        return Linear(weight, None, packed)
    zeros = [w.weight.new_zeros(len(w.weight)) if w.bias is None else w.bias for w in parts]
    return Linear(weight, torch.cat(zeros), packed)


def check_supported(config: Any) -> int:
    """Return the longest sequence this engine does exactly, or say what it cannot do."""
    name = config.model_type
    if name not in FAMILIES:
        raise UnsupportedModel(f"model family {name!r} is not one of {', '.join(FAMILIES)}")
    if getattr(config, "quantization_config", None):
        raise UnsupportedModel("quantised checkpoints are not supported; use the original weights")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in FIXED_ROPE:
        raise UnsupportedModel(
            f"rope type {rope['rope_type']!r} changes with the sequence length, so prefixes of "
            f"different lengths cannot share work; supported: {', '.join(FIXED_ROPE)}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel("partial rotary embeddings are not supported")
    kinds = set(getattr(config, "layer_types", None) or [])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(f"layers of type {sorted(unknown)[0]!r} are not supported")
    limit = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if window and ("sliding_attention" in kinds or not kinds):
        limit = min(limit, int(window))  # up to its window a sliding layer is a full one
    return limit


def packing_is_faster(weight: torch.Tensor) -> bool:
    """Time one product both ways on this machine; pre-packing is a CPU matter."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    x = torch.ones((256, weight.shape[1]), dtype=weight.dtype)
    seconds = {}
    for packed in (False, True):
        linear = Linear(weight, None, packed)
        runs = []
        for _ in range(4):  # the first one warms up
            start = time.perf_counter()
            linear(x)
            runs.append(time.perf_counter() - start)
        seconds[packed] = min(runs[1:])
    return seconds[True] < seconds[False]
