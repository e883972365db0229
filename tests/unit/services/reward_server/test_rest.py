"""The REST front door over the real handlers and the fake engine."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.reward_server import rest_models
from services.reward_server.auth import HttpAuth
from services.reward_server.rest import make_app
from services.reward_server.rest_docs import IDS_EXAMPLE, IDS_REPLY, TEXT_EXAMPLE
from tests.rest_stand import PATH, VOCAB, asgi_client, client, get, post, refused, rest_stand
from tests.reward_stand import Stand


@pytest.fixture
def stand() -> Stand:
    return rest_stand()


async def test_the_documented_example_gives_the_documented_reply(stand: Stand) -> None:
    reply = await post(stand, IDS_EXAMPLE)

    assert reply.status_code == 200
    assert json.loads(reply.text, parse_float=lambda text: round(float(text), 9)) == IDS_REPLY
    rest_models.ScoreTurnsResponse.model_validate(reply.json())


async def test_a_bad_rollout_leaves_the_others_ok(stand: Stand) -> None:
    (good,) = IDS_EXAMPLE["rollouts"]
    reply = await post(stand, {"rollouts": [good, {**good, "prefix_ends": [9]}, {}, good]})

    statuses = [score["status"] for score in reply.json()["scores"]]
    assert statuses == ["ROLLOUT_STATUS_OK", *["ROLLOUT_STATUS_INVALID"] * 2, "ROLLOUT_STATUS_OK"]
    assert reply.json()["scores"][1]["reason"] == "prefix_ends[0]: must be in 1..3, got 9"
    rest_models.ScoreTurnsResponse.model_validate(reply.json())


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"rolouts": []}, '"rolouts"'),
        ({"rollouts": [{"token_idz": [1]}]}, 'no field named "token_idz".*rollouts\\[0\\]'),
        ({"rollouts": [{"token_ids": [-1]}]}, "token_ids.*-1"),
        ({"rollouts": [{"token_ids": [1 << 32]}]}, "token_ids.*4294967296"),
        ({"rollouts": 3}, "rollouts"),
        ({"options": {"gain_kind": "LOG"}}, "gain_kind"),
        ({"rollouts": [{}], "options": 5}, "options"),
        ({}, "rollouts: is empty"),
        ([], "not a JSON object"),
        (b"{", "not JSON: .*line 1 column 2"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ({"wrapper": {"head": "x"}, "rollouts": [{"token_ids": [1]}]}, "rollouts.0..messages"),
        ({**TEXT_EXAMPLE, "wraper": {}}, '"wraper"'),
        ({**TEXT_EXAMPLE, "wrapper": {"heda": "x"}}, "wrapper.head: Field required"),
        ({**TEXT_EXAMPLE, "wrapper": {"head": "", "tial": ""}}, "wrapper.tial: unknown field"),
        ({**TEXT_EXAMPLE, "options": {"gian": 1}}, '"gian"'),
        (TEXT_EXAMPLE, "no tokenizer: send token ids"),
    ],
)
async def test_a_body_that_is_no_request_is_refused_by_name(
    stand: Stand, body: Any, problem: str
) -> None:
    assert re.search(problem, await refused(stand, body))
    assert stand.value("requests_total", method="ScoreTurns", status="InvalidRequest") == 1


async def test_a_problem_never_repeats_a_long_body() -> None:
    assert len(await refused(Stand(), {"rollouts": {"x": "y" * 10_000}})) <= 500


async def test_the_body_is_read_up_to_the_limit_and_no_further() -> None:
    stand, read = Stand(max_request_bytes=1000), 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 100
            yield b" " * 100

    async with client(stand) as http:
        streamed = await http.post(PATH, content=endless())
        announced = await http.post(PATH, content=b" " * 1001)

    assert (streamed.status_code, announced.status_code) == (413, 413)
    assert "max_request_bytes=1000" in streamed.json()["detail"]
    assert read <= 1200


async def test_full_is_429_with_the_time_to_wait(stand: Stand) -> None:
    big = {**IDS_EXAMPLE["rollouts"][0], "token_ids": [1] * 3000, "prefix_ends": [3000]}
    bodies = [{"rollouts": [{**big, "token_ids": [i] * 3000}]} for i in range(1, 9)]
    stand.engine.seconds_per_token = 1e-5

    replies = await asyncio.gather(*(post(stand, body) for body in bodies))

    full = [reply for reply in replies if reply.status_code == 429]
    assert 0 < len(full) < len(replies)
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in full)


async def test_a_deadline_that_passes_is_a_status_of_each_rollout(stand: Stand) -> None:
    stand.engine.seconds_per_token = 1.0
    reply = await post(stand, IDS_EXAMPLE, headers={"x-deadline-s": "0.05"})

    assert [s["status"] for s in reply.json()["scores"]] == ["ROLLOUT_STATUS_DEADLINE"]


async def test_a_body_that_does_not_come_in_time_is_504(stand: Stand) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(10)

    async with client(stand) as http:
        reply = await http.post(PATH, content=slow(), headers={"x-deadline-s": "0.02"})

    assert (reply.status_code, reply.json()["detail"]) == (
        504,
        "the body was not there after 0.02 s",
    )


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
async def test_a_deadline_that_is_none_is_refused(stand: Stand, seconds: str) -> None:
    assert "x-deadline-s" in await refused(stand, IDS_EXAMPLE, {"x-deadline-s": seconds})


async def test_who_hangs_up_frees_the_work_at_once(stand: Stand) -> None:
    stand.engine.seconds_per_token = 100.0
    body = json.dumps(IDS_EXAMPLE).encode()
    messages = iter([{"type": "http.request", "body": body}, {"type": "http.disconnect"}])
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(0.01)
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": PATH,
        "headers": [],
        "query_string": b"",
        "client": ("peer", 1),
    }
    async with asyncio.timeout(2):
        await make_app(stand.handlers, stand.registry)(scope, receive, send)
        await stand.handlers.idle()

    assert stand.value("requests_total", method="ScoreTurns", status="Cancelled") == 1


async def test_not_ready_is_503_everywhere_but_at_healthz(stand: Stand) -> None:
    stand.handlers.refuse("draining")

    replies = [await get(stand, path) for path in ("/healthz", "/readyz", "/v1/info")]
    assert [reply.status_code for reply in replies] == [200, 503, 503]
    assert {reply.text for reply in replies[1:]} == {'{"detail":"draining"}'}
    assert [(await post(stand, body)).status_code for body in (IDS_EXAMPLE, TEXT_EXAMPLE)] == [
        503
    ] * 2


async def test_info_and_metrics_tell_what_is_served(stand: Stand) -> None:
    await post(stand, IDS_EXAMPLE)
    info, metrics = await get(stand, "/v1/info"), await get(stand, "/metrics")

    model = rest_models.ServerInfo.model_validate(info.json())
    assert (model.vocab_size, model.limits.max_rollouts) == (VOCAB, 1024)
    assert info.json()["limits"]["max_request_bytes"] == 64 << 20
    assert 'turnwise_reward_rollouts_total{status="OK"} 1.0' in metrics.text
    assert metrics.headers["content-type"].startswith("text/plain")
    assert (await get(stand, "/readyz")).json() == {"status": "ready"}


async def test_the_token_is_asked_for_around_the_app(stand: Stand) -> None:
    app = HttpAuth(make_app(stand.handlers, stand.registry), "secret")
    async with asgi_client(app) as http:
        without = await http.post(PATH, json=IDS_EXAMPLE)
        allowed = await http.post(
            PATH, json=IDS_EXAMPLE, headers={"authorization": "Bearer secret"}
        )
    assert (without.status_code, allowed.status_code) == (401, 200)
