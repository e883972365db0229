"""Load the tokenizer that lies beside a checkpoint; nothing is ever fetched."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

# Without one of these, transformers makes up an empty tokenizer for some models.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(model_path: Path) -> Any:
    """Raises OSError, ValueError or TypeError when there is none that can be read."""
    if not any((model_path / name).is_file() for name in VOCABULARY_FILES):
        raise FileNotFoundError(f"{model_path} holds none of {', '.join(VOCABULARY_FILES)}")
    return AutoTokenizer.from_pretrained(model_path, local_files_only=True, trust_remote_code=False)
