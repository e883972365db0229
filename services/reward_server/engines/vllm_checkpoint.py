"""Read what a checkpoint holds, without its weights, and tell whether the model can take it."""

import json
from math import prod
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open
from vllm.transformers_utils.config import get_config

from turnwise.errors import InvalidInput

# Differences that change neither the arithmetic nor the shapes.
NEUTRAL_KEYS = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


class Checkpoint(msgspec.Struct, frozen=True):
    config: dict[str, Any]  # config.json with vLLM's defaults filled in
    shapes: dict[str, tuple[int, ...]]  # of every tensor, by name

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())


def read_checkpoint(directory: Path) -> Checkpoint:
    """Return the checkpoint's config and tensor shapes; raise InvalidInput if unreadable."""
    place = str(directory)
    if not (directory / "config.json").is_file():
        raise InvalidInput(place, "no checkpoint: config.json is missing")
    try:
        config = get_config(directory, trust_remote_code=False).to_dict()
    except Exception as error:  # whatever the parser of some model family raises
        raise InvalidInput(place, f"config.json cannot be used: {error}") from error
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(directory):
        try:
            # Opening checks the header and that the file is as long as the header says.
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise InvalidInput(place, f"{file.name} cannot be read: {error}") from error
    return Checkpoint(config, shapes)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInput(str(directory), f"{index.name} cannot be read: {error}") from error
        return [directory / name for name in sorted(names)]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise InvalidInput(str(directory), "no checkpoint: there are no *.safetensors files")
    return files


def check_same_model(directory: Path, new: Checkpoint, served: Checkpoint) -> None:
    """Raise InvalidInput unless `new` holds other weights of the very model that is served."""
    place = str(directory)
    keys = sorted((new.config.keys() | served.config.keys()) - NEUTRAL_KEYS)
    for key in ["model_type", *keys]:
        ours, theirs = served.config.get(key), new.config.get(key)
        if ours != theirs:
            raise InvalidInput(place, f"{key} is {theirs!r}, the served model has {ours!r}")
    # A tied output layer may be saved or left out: it is the embedding either way.
    optional = {"lm_head.weight"} if served.config.get("tie_word_embeddings") else set()
    for name in sorted((new.shapes.keys() | served.shapes.keys()) - optional):
        ours, theirs = served.shapes.get(name), new.shapes.get(name)
        if ours != theirs:
            raise InvalidInput(
                place,
                f"tensor {name} is {_shape(theirs)} here and {_shape(ours)} in the served model",
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"
