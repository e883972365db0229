"""The policy's own tokenizer, loaded when somebody first sends text."""

import asyncio
from pathlib import Path
from typing import Any

from services.reward_server.errors import InvalidRequest


class TokenizerSource:
    def __init__(self, model_path: Path | None) -> None:
        self._model_path = model_path
        self._tokenizer: Any = None
        self._turn = asyncio.Lock()

    async def get(self) -> Any:
        async with self._turn:
            if self._tokenizer is None:
                self._tokenizer = await asyncio.to_thread(_load, self._model_path)
        return self._tokenizer


def _load(model_path: Path | None) -> Any:
    if model_path is None:
        raise InvalidRequest("this server has no model, and so no tokenizer: send token ids")
    # Heavy, and many servers see token ids only.
    from services.reward_server.engines.tokenizer import load_tokenizer  # noqa: PLC0415

    try:
        return load_tokenizer(model_path)
    except (OSError, ValueError, TypeError) as error:
        cause = " ".join(str(error).split())
        raise InvalidRequest(f"this model has no tokenizer, send token ids: {cause}") from error
