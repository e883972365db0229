"""Submit requests to vLLM in order, and abort those that nobody waits for any more."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input

_numbers = count()


@asynccontextmanager
async def submitted(
    llm: Any, wanted: Iterable[tuple[list[int], SamplingParams]]
) -> AsyncIterator[list[Any]]:
    """Submit prompts and yield where their outputs arrive; on leaving, abort what is left.

    In place of a request that vLLM refuses stands its VLLMValidationError.
    """
    ids: list[str] = []
    collectors: list[Any] = []
    try:
        for prompt, params in wanted:
            ids.append(f"turnwise-{next(_numbers)}")
            try:
                collector = await llm.add_request(ids[-1], tokens_input(prompt), params)
            except VLLMValidationError as error:
                collector = error
            collectors.append(collector)
            await asyncio.sleep(0)  # submitting thousands must not block the event loop
        yield collectors
    finally:
        await llm.abort(ids)  # finished ones are unknown by now
