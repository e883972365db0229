"""The bearer token in an authorization header."""

import pytest

from services.reward_server.auth import HttpAuth, Message, Receive, Scope, Send, is_allowed


@pytest.mark.parametrize("header", ["Bearer s3cret", b"bearer s3cret", "Bearer  s3cret"])
def test_the_token_opens(header: str | bytes) -> None:
    assert is_allowed("s3cret", header)


@pytest.mark.parametrize(
    "header", ["", "s3cret", "Bearer", "Bearer s3cre", "Bearer s3cret2", "Basic s3cret", "Bearer é"]
)
def test_anything_else_does_not(header: str) -> None:
    assert not is_allowed("s3cret", header)


async def ask(path: str, *headers: tuple[bytes, bytes]) -> int:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {}

    await HttpAuth(app, "s3cret")({"type": "http", "path": path, "headers": headers}, receive, send)
    return int(sent[0]["status"])


async def test_http_asks_for_the_token_everywhere_but_for_probes_and_docs() -> None:
    assert await ask("/v1/score_turns") == 401
    assert await ask("/metrics") == 401
    assert await ask("/v1/info", (b"authorization", b"Bearer s3cret")) == 200
    assert [await ask(path) for path in ("/healthz", "/readyz", "/docs", "/openapi.json")] == [
        200
    ] * 4
