"""The reward clients against real servers in processes of their own; every number by hand.

The log-prob of a token is -(1 + (sum of all ids before it + its id + version) % 10) / 10, so the
rollout below has the scores -0.9 and -0.2 under version 0.
"""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from tests.reward_double import Double, Process, processes
from turnwise.client_channels import ClientOptions
from turnwise.errors import (
    AccessDenied,
    DeadlineExceeded,
    InvalidInput,
    RequestRefused,
    RewardOverloaded,
    RewardUnavailable,
    StreamBroken,
    TurnwiseError,
)
from turnwise.reward_client import AsyncRewardClient, RewardClient
from turnwise.reward_session import session_open
from turnwise.score_result import ScoreResult, Usage, answer, from_ids, score_options
from turnwise.v1 import reward_pb2 as pb

GRACE_S = 0.5  # what a deadline may be passed by on a busy machine


def rollout(group: str = "g", name: str = "r") -> pb.Rollout:
    return from_ids([1, 2, 3, 4], [2, 3], [[5]], rollout_id=name, group_id=group)


def groups(count: int, size: int = 4) -> list[pb.Rollout]:
    """Rollouts that differ: number i has the ids 1, 2, 3 and i % 10."""
    return [
        from_ids([1, 2, 3, i % 10], [2, 4], [[5]], rollout_id=f"r{i}", group_id=f"g{i // size}")
        for i in range(count * size)
    ]


def check_groups(result: ScoreResult, version: int = 0) -> None:
    """Every rollout of `groups` has its own scores, in order."""
    for i, score in enumerate(result):
        last = -(1 + (6 + i % 10 + 5 + version) % 10) / 10
        assert score.rollout_id == f"r{i}"
        assert score.scores.tolist() == pytest.approx([-(1 + (8 + version) % 10) / 10, last])


class Blocking:
    """AsyncRewardClient behind plain calls, so that one test serves both clients."""

    def __init__(self, addresses: str | Sequence[str], options: ClientOptions | None = None):
        self.client, self.runner = AsyncRewardClient(addresses, options), asyncio.Runner()
        self.router, self.closed = self.client.router, False

    def score(self, *args: Any, **kwargs: Any) -> ScoreResult:
        return self.runner.run(self.client.score(*args, **kwargs))

    def info(self, *args: Any, **kwargs: Any) -> pb.GetServerInfoResponse:
        return self.runner.run(self.client.info(*args, **kwargs))

    def sample(self, *args: Any, **kwargs: Any) -> Iterator[pb.SampleResponse]:
        replies = self.client.sample(*args, **kwargs)
        with contextlib.suppress(StopAsyncIteration):
            while True:
                yield self.runner.run(anext(replies))  # type: ignore[arg-type]

    @contextlib.contextmanager
    def session(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        stack = contextlib.AsyncExitStack()
        context = self.client.session(*args, **kwargs)
        session = self.runner.run(stack.enter_async_context(context))
        runner = self.runner

        class Plain:
            opened = session.opened

            def extend(self, ids: Sequence[int]) -> Any:
                return runner.run(session.extend(ids))

            def close(self) -> Any:
                return runner.run(session.close())

        try:
            yield Plain()
        finally:
            runner.run(stack.aclose())

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.runner.run(self.client.close())
            self.runner.close()


Connect = Callable[..., Any]


@pytest.fixture(params=["plain", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Make clients of either kind; they are closed at the end."""
    made: list[Any] = []

    def connect(servers: Process | Sequence[Process] | str, **options: Any) -> Any:
        given = [servers] if isinstance(servers, Process | str) else servers
        addresses = [server if isinstance(server, str) else server.address for server in given]
        kind = RewardClient if request.param == "plain" else Blocking
        made.append(kind(addresses, ClientOptions(**options)))
        return made[-1]

    yield connect
    for client in made:
        client.close()


@pytest.fixture(scope="module")
def pool() -> Iterator[Sequence[Process]]:
    with processes(Double(), Double(), Double()) as servers:
        yield servers


@pytest.fixture
def servers(pool: Sequence[Process]) -> Sequence[Process]:
    """Three healthy servers, which remember nothing of earlier tests."""
    for server in pool:
        server.reset()
    return pool


@pytest.fixture
def server(servers: Sequence[Process]) -> Process:
    return servers[0]


def requests(*servers: Process) -> list[dict[str, Any]]:
    return [request for server in servers for request in server.stats()["requests"]]


def home_of(client: Any, servers: Sequence[Process], group: str) -> Process:
    address = client.router.order(f"group {group}")[0].address
    return next(server for server in servers if server.address == address)


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    end = monotonic() + timeout_s
    while not condition():
        assert monotonic() < end, "it never came"
        sleep(0.01)


# Scores


def test_scores_gains_version_route_and_usage(connect: Connect, server: Process) -> None:
    server.set(versions=[3])
    score = connect(server).score([rollout()])[0]

    # (1 + 2 + 5 + 3) % 10 = 1 and (1 + 2 + 3 + 5 + 3) % 10 = 4
    assert score.scores.tolist() == pytest.approx([-0.2, -0.5])
    assert score.gains.tolist() == pytest.approx([-0.3])
    assert (score.policy_version, score.route) == (3, "fake")
    assert score.usage == Usage(tokens_total=5, tokens_unique=3, tokens_computed=3)


def test_aliases_and_token_logprobs(connect: Connect, server: Process) -> None:
    one = from_ids([1, 2, 3, 4], [2, 3], [[5], answer([5, 1, 9], 0, 2)])
    score = connect(server).score([one], score_options(alias="mean", token_logprobs=True))[0]

    # Under prefix 0: -0.9, and the mean of -0.9 and -1.0; under prefix 1: -0.2, of -0.2 and -0.3.
    assert score.answer_scores.tolist() == [
        pytest.approx([-0.9, -0.95]),
        pytest.approx([-0.2, -0.25]),
    ]
    assert score.scores.tolist() == pytest.approx([-0.925, -0.225])
    assert score.token_logprobs[0][1].tolist() == pytest.approx([-0.9, -1.0])


def test_a_bad_rollout_has_a_status_and_the_others_their_scores(
    connect: Connect, server: Process
) -> None:
    poison = from_ids([1, 99], [1], [[5]], rollout_id="poison")
    result = connect(server).score([rollout(), poison, rollout()])

    assert result.statuses == ("OK", "ERROR", "OK")
    assert result[1].reason == "token 99 is poison"
    assert result.scores.values.tolist() == pytest.approx([-0.9, -0.2, -0.9, -0.2])


def test_no_rollouts_no_call(connect: Connect, server: Process) -> None:
    assert len(connect(server).score([])) == 0
    assert server.stats()["infos"] == 0


def test_info_is_asked_anew(connect: Connect, server: Process) -> None:
    client = connect(server)

    assert [client.info().engine, client.info().route] == ["fake", "fake"]
    assert server.stats()["infos"] == 2


def test_a_reply_that_is_no_score_becomes_an_error(connect: Connect, server: Process) -> None:
    server.set(bad_score=0.5)
    result = connect(server).score([rollout()])

    assert result.statuses == ("ERROR",)
    assert "0.5 as score 0" in result[0].reason


def test_a_reply_of_the_wrong_length_is_refused(connect: Connect, server: Process) -> None:
    server.set(short_by=1)
    with pytest.raises(RequestRefused, match="sent 1 scores for 2 rollouts"):
        connect(server).score([rollout(), rollout()])


# Batches


def test_batches_keep_groups_whole_and_the_order(
    connect: Connect, servers: Sequence[Process]
) -> None:
    result = connect(servers, max_batch_rollouts=10).score(groups(50))

    check_groups(result)
    sent = requests(*servers)
    assert all(len(request["rollouts"]) <= 10 for request in sent)
    assert len(sent) >= 20
    per_group = [set(request["groups"]) for request in sent]
    assert sum(len(names) for names in per_group) == 50  # no group is in two requests
    assert all(server.stats()["requests"] for server in servers)


@pytest.mark.parametrize(
    ("limits", "most"),
    [({"max_rollouts": 7}, 7), ({"max_queued_tokens": 40}, 6), ({"max_request_bytes": 1124}, 3)],
)
def test_limits_of_the_server_are_kept(
    connect: Connect, server: Process, limits: dict[str, int], most: int
) -> None:
    server.reset(limits=limits)  # a rollout has 6 tokens and 32 bytes; 1 KiB is for the rest
    check_groups(connect(server).score(groups(5, size=8)))

    sent = requests(server)
    assert max(len(request["rollouts"]) for request in sent) == most
    assert max(request["bytes"] for request in sent) <= limits.get("max_request_bytes", 1 << 20)


def test_calls_in_flight_are_bounded(connect: Connect, server: Process) -> None:
    server.set(latency_s=0.03)
    check_groups(connect(server, max_batch_rollouts=4, max_calls=3).score(groups(12)))

    assert server.stats()["most_flying"] == 3


def test_a_rollout_too_large_for_a_message_is_invalid_and_names_the_limit(
    connect: Connect,
) -> None:
    huge = from_ids([1] * 3000, [2], [[5]], rollout_id="huge", group_id="h")
    with processes(Double(limits={"max_request_bytes": 2500})) as (server,):
        result = connect(server).score([rollout(), huge])

    assert result.statuses == ("OK", "INVALID")
    assert "larger than max" in result[1].reason


# Policy versions


def test_a_split_group_is_re_scored_until_one_version_scored_it(
    connect: Connect, server: Process
) -> None:
    server.reset(limits={"max_rollouts": 4})
    server.set(versions=[1, 2])
    result = connect(server, max_calls=1).score(groups(1, size=8))

    check_groups(result, version=2)
    assert result.policy_versions.tolist() == [2] * 8
    first, second, again = requests(server)
    assert (again["rollouts"], again["min_version"]) == (first["rollouts"], 2)
    assert len({first["key"], second["key"], again["key"]}) == 3


def test_overloaded_rollouts_that_meet_a_new_version_pull_their_group_along(
    connect: Connect, server: Process
) -> None:
    server.set(overloaded=1, versions=[1, 2])
    result = connect(server).score(groups(1))

    check_groups(result, version=2)
    assert [request["rollouts"] for request in requests(server)] == [
        ["r0", "r1", "r2", "r3"],
        ["r0"],
        ["r1", "r2", "r3"],
    ]


def test_a_group_that_never_gets_one_version_is_an_error_never_a_mix(
    connect: Connect, server: Process
) -> None:
    server.reset(limits={"max_rollouts": 1})
    server.set(versions=[*range(1, 40)])
    result = connect(server, max_calls=1).score(groups(1, size=2))

    assert result.statuses == ("OK", "ERROR")
    assert "the policy changed in 6 tries" in result[1].reason


# Retries


def test_overloaded_rollouts_are_sent_again_alone(connect: Connect, server: Process) -> None:
    server.set(overloaded=2)
    result = connect(server).score(groups(1))

    check_groups(result)
    first, second = requests(server)
    assert second["rollouts"] == ["r0", "r1"]
    assert second["key"] != first["key"]


def test_overloaded_to_the_end_is_a_status(connect: Connect, server: Process) -> None:
    server.set(overloaded=1_000_000)
    begun = monotonic()
    result = connect(server).score([rollout()], deadline_s=0.4)

    assert (result.statuses, result[0].reason) == (("OVERLOADED",), "no room")
    assert monotonic() - begun < 0.4 + GRACE_S


def test_the_same_request_has_the_same_key_and_is_retried(
    connect: Connect, server: Process
) -> None:
    client = connect(server)
    client.info()
    server.set(unavailable=1)
    check_groups(client.score(groups(2)))

    first, second = requests(server)
    assert first == second
    assert first["key"]


def test_two_calls_have_different_keys(connect: Connect, server: Process) -> None:
    client = connect(server)
    client.score([rollout()])
    client.score([rollout()])

    first, second = requests(server)
    assert first["key"] != second["key"]


def test_retry_after_is_honoured(connect: Connect, server: Process) -> None:
    server.set(exhausted=1, retry_after_s=0.4)
    begun = monotonic()
    check_groups(connect(server).score(groups(1)))

    assert 0.4 <= monotonic() - begun < 0.5 + GRACE_S


def test_a_wait_beyond_the_deadline_fails_at_once(connect: Connect, server: Process) -> None:
    server.set(exhausted=1, retry_after_s=30.0)
    begun = monotonic()
    with pytest.raises(RewardOverloaded, match=f"{server.address}: a fault: exhausted; try later"):
        connect(server).score([rollout()], deadline_s=5.0)

    assert monotonic() - begun < 2


def test_the_deadline_is_over_all_retries(connect: Connect, server: Process) -> None:
    server.set(unavailable=1_000_000)
    begun = monotonic()
    with pytest.raises(DeadlineExceeded, match="a fault: unavailable"):
        connect(server).score([rollout()], deadline_s=0.5)

    assert 0.5 <= monotonic() - begun < 0.5 + GRACE_S


def test_a_server_that_hangs_ends_at_the_deadline(connect: Connect, server: Process) -> None:
    server.set(hang=True)
    begun = monotonic()
    with pytest.raises(DeadlineExceeded, match=server.address):
        connect(server, deadline_s=0.5).score([rollout()])

    assert 0.5 <= monotonic() - begun < 0.5 + GRACE_S
    wait_until(lambda: server.stats()["flying"] == 0)  # the server was told


def test_what_was_scored_before_the_deadline_is_kept(
    connect: Connect, servers: Sequence[Process]
) -> None:
    client = connect(servers)
    slow = home_of(client, servers, "g0")
    slow.set(hang=True)
    result = client.score(groups(30), deadline_s=0.5)

    assert set(result.statuses) == {"OK", "DEADLINE"}
    assert result[0].status == "DEADLINE"
    assert len({score.status for score in result.rollouts[:4]}) == 1  # groups fail as one


# Failover


def test_the_next_on_the_ring_takes_over_and_the_groups_come_home(
    connect: Connect, servers: Sequence[Process]
) -> None:
    client = connect(servers)
    home = home_of(client, servers, "g")
    client.score([rollout()])
    assert len(requests(home)) == 1

    home.set(unavailable=2)  # the call, and the probe after it
    assert client.score([rollout()]).ok.all()
    others = [server for server in servers if server is not home]
    assert len(requests(*others)) == 1

    end = monotonic() + 5
    while len(requests(home)) < 3 and monotonic() < end:
        client.score([rollout()])
    assert len(requests(home)) == 3


@pytest.mark.slow
def test_groups_of_a_dead_server_spread_over_the_others(connect: Connect) -> None:
    with processes(Double(), Double(), Double()) as servers:
        client = connect(servers)
        check_groups(client.score(groups(30)))
        homes = [home_of(client, servers, f"g{i}") for i in range(30)]
        before = [len({g for r in requests(s) for g in r["groups"]}) for s in servers]
        servers[0].kill()
        check_groups(client.score(groups(30)))
        after = [len({g for r in requests(s) for g in r["groups"]}) for s in servers[1:]]

    assert before == [homes.count(server) for server in servers]
    assert all(now > then for now, then in zip(after, before[1:], strict=True))


def test_kill_9_in_the_middle_of_a_call_fails_over(connect: Connect) -> None:
    with processes(Double(), Double()) as servers:
        client = connect(servers)
        home = home_of(client, servers, "g0")
        home.set(hang=True)
        timer = threading.Timer(0.2, home.kill)
        timer.start()
        check_groups(client.score(groups(10), deadline_s=10))
        timer.join()


def test_kill_9_of_the_only_server_is_a_clear_error(connect: Connect) -> None:
    with processes(Double()) as (server,):
        server.set(hang=True)
        timer = threading.Timer(0.2, server.kill)
        timer.start()
        begun = monotonic()
        with pytest.raises(DeadlineExceeded, match=rf"{server.address}: .*; raise deadline_s"):
            connect(server).score([rollout()], deadline_s=1.0)
        assert monotonic() - begun < 1.0 + GRACE_S
        timer.join()


@pytest.mark.slow
def test_a_server_that_is_gone_is_given_up_before_the_deadline(connect: Connect) -> None:
    begun = monotonic()
    with pytest.raises(RewardUnavailable, match="check that the server runs there"):
        connect("127.0.0.1:9").score([rollout()])

    assert 3 < monotonic() - begun < 30


@pytest.mark.slow
def test_a_restarted_server_is_found_again(connect: Connect) -> None:
    with processes(Double()) as (server,):
        client = connect(server)
        assert client.score([rollout()]).ok.all()
        server.kill()
        with ThreadPoolExecutor() as pool, contextlib.ExitStack() as stack:
            again = pool.submit(stack.enter_context, processes(Double(port=server.port)))
            assert client.score([rollout()], deadline_s=20).ok.all()
            again.result()


@pytest.mark.slow
def test_a_stopped_server_is_noticed_by_its_silence(connect: Connect) -> None:
    with processes(Double(), Double()) as servers:
        client = connect(servers, keepalive_s=10.0, keepalive_timeout_s=1.0)
        check_groups(client.score(groups(10)))
        home = home_of(client, servers, "g0")
        home.popen.send_signal(signal.SIGSTOP)
        check_groups(client.score(groups(10)))


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers: what a half-open connection looks like."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_half_open_connection_ends_at_the_deadline(connect: Connect) -> None:
    with silent_server() as address:
        begun = monotonic()
        with pytest.raises(DeadlineExceeded, match=address):
            connect(address).score([rollout()], deadline_s=0.6)
        assert 0.6 <= monotonic() - begun < 0.6 + GRACE_S


def test_a_wrong_token_is_refused_at_once_and_shows_in_no_message(
    connect: Connect, server: Process
) -> None:
    server.reset(token="right")
    assert connect(server, token="right").score([rollout()]).ok.all()
    with pytest.raises(AccessDenied, match="check the API token") as caught:
        connect(server, token="s3cret").score([rollout()])

    assert "s3cret" not in str(caught.value) + repr(ClientOptions(token="s3cret"))


# Samples

PROMPT = pb.SampleRequest(
    prompts=[pb.SamplePrompt(prompt_id="p", token_ids=[1, 2])],
    params=pb.SamplingParams(max_tokens=4),
)


def test_sampled_tokens_come_one_by_one(connect: Connect, server: Process) -> None:
    replies = list(connect(server).sample(PROMPT))

    # Each token is the sum of all before it.
    assert [[*reply.token_ids] for reply in replies] == [[3], [6], [12], [24]]
    assert replies[-1].finish_reason == pb.FINISH_REASON_LENGTH


def test_a_sample_is_retried_before_its_first_token(connect: Connect, server: Process) -> None:
    server.set(unavailable=2, exhausted=1, retry_after_s=0.1)

    assert len(list(connect(server).sample(PROMPT))) == 4
    assert server.stats()["samples"] == 2


def test_a_sample_is_never_retried_after_its_first_token(connect: Connect, server: Process) -> None:
    server.set(break_after=2)
    replies = connect(server).sample(PROMPT)

    assert [[*next(replies).token_ids] for _ in range(2)] == [[3], [6]]
    with pytest.raises(StreamBroken, match="ended half-way, discard it"):
        next(replies)
    assert server.stats()["samples"] == 1


def test_a_sample_that_hangs_ends_at_the_deadline(connect: Connect, server: Process) -> None:
    server.set(hang=True)
    begun = monotonic()
    with pytest.raises(DeadlineExceeded, match=server.address):
        next(connect(server).sample(PROMPT, deadline_s=0.5))

    assert monotonic() - begun < 0.5 + GRACE_S


def test_a_slow_reader_of_a_sample_loses_nothing(connect: Connect, server: Process) -> None:
    request = pb.SampleRequest(prompts=PROMPT.prompts, params=pb.SamplingParams(max_tokens=300))
    read = 0
    for reply in connect(server).sample(request):
        read += len(reply.token_ids)
        sleep(0.002)

    assert read == 300


def test_a_sample_that_is_left_early_frees_the_server(server: Process) -> None:
    request = pb.SampleRequest(prompts=PROMPT.prompts, params=pb.SamplingParams(max_tokens=4000))
    with RewardClient(server.address) as client:
        replies = client.sample(request)
        next(replies)
        replies.close()  # type: ignore[attr-defined]
        wait_until(lambda: server.stats()["flying"] == 0)


# Sessions


def test_a_session_scores_each_prefix_as_it_comes(connect: Connect, server: Process) -> None:
    with connect(server).session(session_open([1, 2], [[5]], rollout_id="s")) as session:
        assert session.opened.score.scores.tolist() == pytest.approx([-0.9])
        step = session.extend([3])
        assert (step.first_prefix, step.provisional) == (1, True)
        assert step.score.scores.tolist() == pytest.approx([-0.2])
        assert step.score.gains.tolist() == pytest.approx([0.7])
        whole = session.close()

    assert whole.rollout_id == "s"
    assert whole.scores.tolist() == pytest.approx([-0.9, -0.2])
    assert whole.gains.tolist() == pytest.approx([0.7])


def test_a_new_version_re_scores_the_session_from_its_first_prefix(
    connect: Connect, server: Process
) -> None:
    server.set(versions=[0, 1])
    with connect(server).session(session_open([1, 2], [[5]])) as session:
        step = session.extend([3])

    assert step.first_prefix == 0
    assert step.score.scores.tolist() == pytest.approx([-1.0, -0.3])
    assert step.score.gains.tolist() == pytest.approx([0.7])


def test_a_broken_session_is_never_continued_silently(connect: Connect, server: Process) -> None:
    server.set(break_after=1)
    with connect(server).session(session_open([1, 2], [[5]])) as session:
        for _ in range(2):
            with pytest.raises(StreamBroken, match="open a new"):
                session.extend([3])

    assert server.stats()["steps"] == 2


def test_a_session_opens_on_the_next_server_when_its_home_is_gone(
    connect: Connect, servers: Sequence[Process]
) -> None:
    client = connect(servers)
    client.score(groups(30))  # now every server is known
    home = home_of(client, servers, "g")
    home.set(unavailable=3)
    with client.session(session_open([1, 2], [[5]], group_id="g")) as session:
        assert session.opened.score.scores.tolist() == pytest.approx([-0.9])

    assert home.stats()["steps"] == 0


def test_a_session_step_has_a_deadline(connect: Connect, server: Process) -> None:
    with connect(server).session(session_open([1, 2], [[5]]), deadline_s=0.5) as session:
        server.set(hang=True)
        begun = monotonic()
        with pytest.raises(
            DeadlineExceeded, match=r"no reply to a step of the session within 0\.5 s"
        ):
            session.extend([3])
    assert monotonic() - begun < 0.5 + GRACE_S


# Where a client lives


def test_threads_share_a_client(server: Process) -> None:
    with RewardClient(server.address) as client, ThreadPoolExecutor(16) as pool:
        results = pool.map(lambda _: client.score(groups(3)), range(64))
        for result in results:
            check_groups(result)


async def test_the_plain_client_works_where_a_loop_runs(server: Process) -> None:
    with RewardClient(server.address) as client:
        assert client.score([rollout()]).ok.all()


def test_an_async_client_moves_from_loop_to_loop(server: Process) -> None:
    client = AsyncRewardClient(server.address)
    for _ in range(3):
        assert asyncio.run(client.score([rollout()])).ok.all()
    asyncio.run(client.close())


async def test_closing_a_client_ends_its_calls(server: Process) -> None:
    server.set(hang=True)
    client = AsyncRewardClient(server.address)
    task = asyncio.create_task(client.score([rollout()]))
    while not server.stats()["flying"]:
        await asyncio.sleep(0.01)
    await client.close()
    with pytest.raises(TurnwiseError, match="the client is closed"):
        await task


async def test_cancelling_a_score_frees_the_server(server: Process) -> None:
    server.set(hang=True)
    async with AsyncRewardClient(server.address) as client:
        task = asyncio.create_task(client.score([rollout()]))
        while not server.stats()["flying"]:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while server.stats()["flying"]:
            await asyncio.sleep(0.01)


def run_forked(work: Callable[[], bool]) -> bool:
    """Whether the work succeeds in a forked child, which is killed when it takes too long."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    alarm = threading.Timer(10, os.kill, (child, signal.SIGKILL))
    alarm.start()
    status = os.waitpid(child, 0)[1]
    alarm.cancel()
    return status == 0


def test_a_forked_child_connects_anew_and_the_parent_goes_on(server: Process) -> None:
    with RewardClient(server.address) as client:
        assert client.score([rollout()]).ok.all()
        for _ in range(3):
            assert run_forked(lambda: client.score([rollout()]).ok.all().item())
            assert client.score([rollout()]).ok.all()


def refused(work: Callable[[], object], advice: str) -> bool:
    try:
        work()
    except TurnwiseError as error:
        return advice in str(error)
    return False


def test_an_async_client_says_that_it_cannot_go_on_in_a_forked_child(server: Process) -> None:
    client, plain = AsyncRewardClient(server.address), RewardClient(server.address)

    def in_child() -> bool:
        late = refused(lambda: asyncio.run(client.score([rollout()])), "use RewardClient here")
        return late and bool(plain.score([rollout()]).ok.all())

    with asyncio.Runner() as runner:
        assert runner.run(client.score([rollout()])).ok.all()
        assert run_forked(in_child)
        assert runner.run(client.score([rollout()])).ok.all()
        runner.run(client.close())
    plain.close()


def test_a_child_forked_in_the_middle_of_a_call_gets_a_clear_error(server: Process) -> None:
    server.set(latency_s=0.5)
    with RewardClient(server.address) as client, ThreadPoolExecutor(1) as pool:
        busy = pool.submit(client.score, [rollout()])
        wait_until(lambda: bool(server.stats()["flying"]))
        assert run_forked(lambda: refused(lambda: client.score([rollout()]), "workers by spawn"))
        assert busy.result().ok.all()


def score_elsewhere(client: RewardClient) -> list[float]:
    return [float(score) for score in client.score([rollout()])[0].scores]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_pool_workers_get_the_client_and_connect_themselves(server: Process, method: str) -> None:
    with RewardClient(server.address) as client:
        assert score_elsewhere(client) == pytest.approx([-0.9, -0.2])
        with multiprocessing.get_context(method).Pool(2) as pool:
            for scores in pool.map(score_elsewhere, [client] * 4):
                assert scores == pytest.approx([-0.9, -0.2])


def sockets_open() -> int:
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.path.exists(link) and "socket" in os.readlink(link) for link in links)


def test_closed_clients_leave_no_connection(connect: Connect, server: Process) -> None:
    clients = [connect(server) for _ in range(8)]
    for client in clients:
        client.info()
    before = sockets_open()
    for client in clients:
        client.close()
    wait_until(lambda: sockets_open() <= before - 8)


def test_a_closed_client_says_so(server: Process) -> None:
    client = RewardClient(server.address)
    client.close()
    with pytest.raises(TurnwiseError, match="the client is closed"):
        client.score([rollout()])


# TLS


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root (ca.pem), and server.pem and client.pem with keys, signed by it."""
    folder = tmp_path_factory.mktemp("tls")
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    root = ["-x509", "-subj", "/CN=root", "-days", "2", "-keyout", "ca.key", "-out", "ca.pem"]
    openssl(folder, "req", *new, *root)
    (folder / "ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for name in ("server", "client"):
        ask = ["-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr"]
        openssl(folder, "req", *new, *ask)
        sign = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2"]
        files = ["-in", f"{name}.csr", "-out", f"{name}.pem", "-extfile", "ext"]
        openssl(folder, "x509", "-req", *sign, *files)
    return folder


@pytest.mark.slow
def test_tls_with_a_root_and_mutual_tls(connect: Connect, certificates: Path) -> None:
    key, pem, ca = ((certificates / n).read_text() for n in ("server.key", "server.pem", "ca.pem"))
    root = {"ca_file": certificates / "ca.pem"}
    pair = {"cert_file": certificates / "client.pem", "key_file": certificates / "client.key"}
    plain, mutual = Double(tls=(key, pem), token="t"), Double(tls=(key, pem), client_ca=ca)
    with processes(plain, mutual) as (one, two):
        assert connect(one, token="t", **root).score([rollout()]).ok.all()
        assert connect(two, **root, **pair).score([rollout()]).ok.all()
        for client in (connect(two, **root), connect(one, tls=True), connect(one)):
            with pytest.raises((DeadlineExceeded, RewardUnavailable)):
                client.score([rollout()], deadline_s=0.2)


def test_a_client_certificate_needs_its_key() -> None:
    with pytest.raises(InvalidInput, match="given together or not at all"):
        ClientOptions(cert_file=Path("client.pem"))
