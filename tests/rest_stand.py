"""The REST front door over the fake engine, asked without a socket."""

import json
from pathlib import Path
from typing import Any

import httpx2
from prometheus_client import CollectorRegistry

from services.reward_server.engines.fake_engine import FakeEngine
from services.reward_server.handlers import Handlers
from services.reward_server.metrics import ServerMetrics
from services.reward_server.requests import Limits
from services.reward_server.rest import make_app
from services.reward_server.scoring import Backend
from services.reward_server.tokenizer import TokenizerSource
from tests.reward_stand import POISON, Stand

VOCAB = 265  # of tests/chat_tokenizer.py, which only tests of text import
PATH = "/v1/score_turns"


def asgi_client(app: Any) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://reward")


def client(stand: Stand, handlers: Handlers | None = None) -> httpx2.AsyncClient:
    return asgi_client(make_app(handlers or stand.handlers, stand.registry))


async def post(
    stand: Stand, body: Any, handlers: Handlers | None = None, headers: dict[str, str] | None = None
) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body)
    async with client(stand, handlers) as http:
        return await http.post(PATH, content=content, headers=headers)


async def get(stand: Stand, path: str) -> httpx2.Response:
    async with client(stand) as http:
        return await http.get(path)


def rest_stand() -> Stand:
    return Stand(FakeEngine(vocab_size=VOCAB, poison_id=POISON))


async def refused(stand: Stand, body: Any, headers: dict[str, str] | None = None) -> str:
    reply = await post(stand, body, headers=headers)
    assert reply.status_code == 400
    detail: str = reply.json()["detail"]
    return detail


def text_handlers(stand: Stand, directory: Path, **limits: int) -> Handlers:
    """Handlers of the same engine, beside a tokenizer on disk."""
    source = TokenizerSource(directory)
    handlers = Handlers(ServerMetrics(CollectorRegistry()), Limits(**limits), source)
    handlers.serve(Backend(stand.engine, stand.scorer(stand.engine), stand.policy))
    return handlers
