"""The model's forward equals transformers', and what it cannot do exactly is refused at load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from services.reward_server.engines.model import DecoderModel, Linear, UnsupportedModel
from tests.tiny_models import VOCAB, Family, plain_model, save_tiny_model

CPU = torch.device("cpu")
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5}


def causal(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Plain attention over one sequence."""
    q_1HNW, k_1KNW, v_1KNW = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q_1HNW, k_1KNW, v_1KNW, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1).reshape(len(q), -1)


def ids_of(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed))


def own_logits(model: DecoderModel, ids_N: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        states_ND = model.forward(ids_N, torch.arange(len(ids_N)), causal)
        return model.logits(model.final_norm(states_ND))


def check_logits(directory: Path, tokens: int = 40) -> None:
    ids_N = ids_of(tokens)
    with torch.no_grad():
        plain_NV = plain_model(directory)(ids_N[None]).logits[0]
    own_NV = own_logits(DecoderModel(directory, torch.float32, CPU), ids_N)
    assert (own_NV - plain_NV).abs().max() <= 1e-4
    assert plain_NV.std() > 1.0  # far from uniform: an error would show


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_logits_equal_those_of_transformers(tmp_path: Path, family: Family, tied: bool) -> None:
    check_logits(save_tiny_model(tmp_path, family, tied=tied))


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True, "head_dim": 64}),
        ("mistral", {"num_key_value_heads": 1}),
        ("qwen2", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
        ("llama", {"hidden_act": "gelu", "intermediate_size": 600}),
        ("llama", {"rope_parameters": LINEAR}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("qwen2", {"rope_parameters": YARN}),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ],
)
def test_logits_of_variants_equal_those_of_transformers(
    tmp_path: Path, family: Family, overrides: dict[str, Any]
) -> None:
    check_logits(save_tiny_model(tmp_path, family, **overrides))


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("mistral", {"sliding_window": 24}),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
        ),
    ],
)
def test_up_to_its_window_a_sliding_layer_is_a_full_one(
    tmp_path: Path, family: Family, overrides: dict[str, Any]
) -> None:
    directory = save_tiny_model(tmp_path, family, **overrides)
    assert DecoderModel(directory, None, CPU).max_tokens == 24
    check_logits(directory, tokens=24)

    ids_N = ids_of(40)  # past the window the two part: the limit is needed
    with torch.no_grad():
        plain_V = plain_model(directory)(ids_N[None]).logits[0, -1]
    own_V = own_logits(DecoderModel(directory, None, CPU), ids_N)[-1]
    assert (own_V - plain_V).abs().max() > 1e-2


def test_a_window_that_is_switched_off_is_no_limit(tmp_path: Path) -> None:
    off: dict[str, Any] = {"use_sliding_window": False, "sliding_window": 24}
    directory = save_tiny_model(tmp_path, "qwen2", max_position_embeddings=100, **off)
    assert DecoderModel(directory, None, CPU).max_tokens == 100
    check_logits(directory)


def write_config(directory: Path, family: str, **overrides: Any) -> Path:
    AutoConfig.for_model(family, **overrides).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("gpt2", {}, "model family 'gpt2' is not one of llama, mistral, qwen2, qwen3"),
        ("gemma2", {}, "model family 'gemma2'"),
        ("mamba", {}, "model family 'mamba'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope type 'dynamic' changes with the sequence length",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial rotary",
        ),
        (
            "qwen2",
            {"num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"]},
            "layers of type 'linear_attention' are not supported",
        ),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantised checkpoints"),
    ],
)
def test_what_cannot_be_done_exactly_is_refused(
    tmp_path: Path, family: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        DecoderModel(write_config(tmp_path, family, **overrides), None, CPU)


def test_a_checkpoint_without_one_of_its_weights_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    tensors = load_file(save_tiny_model(tmp_path) / weights.name)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})

    with pytest.raises(UnsupportedModel, match=r"lacks usable weights for .*layers\.1\.mlp\.up"):
        DecoderModel(tmp_path, None, CPU)


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    config = json.loads((save_tiny_model(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 191}))

    with pytest.raises(UnsupportedModel, match=r"lacks usable .*layers\.0\.mlp\.down_proj"):
        DecoderModel(tmp_path, None, CPU)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    weights = save_tiny_model(tmp_path) / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    weights.unlink()

    with pytest.raises(OSError, match="safetensors"):
        DecoderModel(tmp_path, None, CPU)


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_a_packed_product_equals_the_plain_one(rows: int) -> None:
    draw = torch.Generator().manual_seed(rows)
    weight, bias = torch.randn((96, 64), generator=draw), torch.randn(96, generator=draw)
    x = torch.randn((rows, 64), generator=draw)
    exact = x.double() @ weight.double().T + bias.double()

    for packed in (False, True):
        assert (Linear(weight, bias, packed)(x) - exact).abs().max() <= 1e-4
        assert (Linear(weight, None, packed)(x) - (exact - bias)).abs().max() <= 1e-4


def test_logprobs_are_a_full_log_softmax_whatever_rows_are_asked(tmp_path: Path) -> None:
    model = DecoderModel(save_tiny_model(tmp_path), None, CPU)
    draw = torch.Generator().manual_seed(1)
    hidden_RD = torch.randn((150, 128), generator=draw)
    rows_P = torch.randint(150, (400,), generator=draw).sort().values  # some twice, some never
    targets_P = torch.randint(VOCAB, (400,), generator=draw)
    full_RV = (hidden_RD.double() @ model.embedding.double().T).log_softmax(-1)

    with torch.inference_mode():
        found_P = model.logprobs(hidden_RD, rows_P, targets_P)
    assert (found_P - full_RV[rows_P, targets_P]).abs().max() <= 1e-4


def test_half_precision_weights_still_give_fp32_logits(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path, vocab=20_001, tied=False, dtype=torch.bfloat16)
    model = DecoderModel(directory, None, CPU)
    hidden_RD = torch.randn((3, 128), generator=torch.Generator().manual_seed(1)).bfloat16()
    head_VD = load_file(directory / "model.safetensors")["lm_head.weight"]

    with torch.inference_mode():
        logits_RV = model.logits(hidden_RD)
    assert (model.dtype, logits_RV.dtype) == (torch.bfloat16, torch.float32)
    assert (logits_RV - hidden_RD.double() @ head_VD.double().T).abs().max() <= 1e-4


def test_weights_are_counted_once_when_tied(tmp_path: Path) -> None:
    tied, untied = (
        DecoderModel(save_tiny_model(tmp_path / str(tied), tied=tied), None, CPU)
        for tied in (True, False)
    )
    assert untied.parameters - tied.parameters == VOCAB * 128
