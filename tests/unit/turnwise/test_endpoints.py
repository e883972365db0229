"""Where a group is sent, and what comes after a failure: the ring, health, the one decision."""

from collections import Counter

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.endpoints import (
    MAX_BACKOFF_S,
    MAX_FAILURES,
    Call,
    HashRing,
    Outcome,
    Reach,
    Router,
    backoff_s,
    next_move,
    retry_wait_s,
    to_error,
)
from turnwise.errors import (
    AccessDenied,
    DeadlineExceeded,
    InvalidInput,
    RequestRefused,
    RewardOverloaded,
    RewardUnavailable,
)
from turnwise.v1 import reward_pb2 as pb

KEYS = [f"group {i}" for i in range(2000)]
names = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6, unique=True)
INFO = pb.GetServerInfoResponse(engine="fake")
LOST = Outcome(grpc.StatusCode.UNAVAILABLE, "connection refused")


def test_a_key_has_the_same_home_in_every_process_and_release() -> None:
    assert HashRing(["a:1", "b:1", "c:1"]).order("run/7") == ("c:1", "b:1", "a:1")


@given(names, st.text())
def test_every_endpoint_stands_once_in_the_order_of_a_key(names: list[str], key: str) -> None:
    order = HashRing(names, points=8).order(key)

    assert sorted(order) == sorted(names)
    assert order == HashRing(names[::-1], points=8).order(key)


@given(names, st.text(min_size=9, max_size=12), st.text())
def test_one_more_endpoint_only_inserts_itself(names: list[str], new: str, key: str) -> None:
    before = HashRing(names, points=8).order(key)
    after = HashRing([*names, new], points=8).order(key)

    assert tuple(name for name in after if name != new) == before


@pytest.mark.parametrize("n", [1, 3, 9])
def test_one_more_endpoint_takes_about_its_share_of_the_keys(n: int) -> None:
    old, new = (HashRing([f"gpu{i}:50051" for i in range(k)]) for k in (n, n + 1))
    moved = sum(old.order(key)[0] != new.order(key)[0] for key in KEYS) / len(KEYS)

    assert moved == pytest.approx(1 / (n + 1), rel=0.35)


def test_endpoints_share_the_keys_about_evenly_and_so_do_those_that_take_over() -> None:
    ring = HashRing([f"gpu{i}:50051" for i in range(4)])
    homes = Counter(ring.order(key)[0] for key in KEYS)
    after_gpu0 = Counter(ring.order(key)[1] for key in KEYS if ring.order(key)[0] == "gpu0:50051")

    assert min(homes.values()) > 0.6 * len(KEYS) / 4
    assert len(after_gpu0) == 3


@pytest.mark.parametrize("addresses", [[], "", ["a:1", ""]])
def test_a_client_needs_addresses(addresses: list[str] | str) -> None:
    with pytest.raises(InvalidInput, match="HOST:PORT"):
        Router(addresses)


@pytest.mark.parametrize(
    ("outcome", "remaining_s", "kind"),
    [
        (LOST, 9.0, "elsewhere"),
        (Outcome(grpc.StatusCode.CANCELLED), 9.0, "elsewhere"),
        (Outcome(grpc.StatusCode.RESOURCE_EXHAUSTED, "", 2.0), 9.0, "wait"),
        (Outcome(grpc.StatusCode.RESOURCE_EXHAUSTED, "", 2.0), 1.0, "give_up"),
        (Outcome(grpc.StatusCode.RESOURCE_EXHAUSTED, "message larger than max"), 9.0, "give_up"),
        (Outcome(grpc.StatusCode.DEADLINE_EXCEEDED), 9.0, "give_up"),
        (Outcome(grpc.StatusCode.INVALID_ARGUMENT), 9.0, "give_up"),
        (Outcome(grpc.StatusCode.INTERNAL), 9.0, "give_up"),
    ],
)
def test_what_comes_after_a_failure(outcome: Outcome, remaining_s: float, kind: str) -> None:
    assert next_move(outcome, 1, remaining_s).kind == kind


def test_the_server_says_how_long_to_wait_and_nobody_comes_early() -> None:
    waits = [retry_wait_s(2.0, attempt) for attempt in range(1, 50)]

    assert min(waits) >= 2.0
    assert max(waits) <= 2.5
    assert len({round(wait, 6) for wait in waits}) > 40


def test_back_off_doubles_to_a_limit_and_is_never_the_same_twice() -> None:
    assert all(0.05 <= backoff_s(1) <= 0.1 for _ in range(50))
    assert all(0.2 <= backoff_s(3) <= 0.4 for _ in range(50))
    assert all(MAX_BACKOFF_S / 2 <= backoff_s(100) <= MAX_BACKOFF_S for _ in range(50))
    assert len({backoff_s(1) for _ in range(50)}) > 40


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("UNAVAILABLE", RewardUnavailable),
        ("RESOURCE_EXHAUSTED", RewardOverloaded),
        ("DEADLINE_EXCEEDED", DeadlineExceeded),
        ("UNAUTHENTICATED", AccessDenied),
        ("PERMISSION_DENIED", AccessDenied),
        ("UNIMPLEMENTED", RequestRefused),
        ("DATA_LOSS", RequestRefused),
    ],
)
def test_an_error_is_one_line_that_names_endpoint_and_advice(code: str, kind: type) -> None:
    error = to_error(Outcome(grpc.StatusCode[code], "what\nwent wrong"), "gpu1:50051")

    assert type(error) is kind
    assert str(error).startswith("gpu1:50051: what went wrong; ")
    assert "\n" not in str(error)


def test_a_message_that_is_too_large_is_no_overload() -> None:
    outcome = Outcome(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max")

    assert isinstance(to_error(outcome, "gpu1:50051"), RequestRefused)


def answer_probes(reach: Reach, now: float, reply: pb.GetServerInfoResponse | Outcome) -> list[str]:
    calls = reach.start(now)
    for call in calls:
        assert isinstance(call, Call)
        reach.finish(call, reply, now)
    return [call.endpoint.address for call in calls]


def test_a_home_is_probed_before_its_first_use_and_once() -> None:
    router = Router(["a:1", "b:1"])
    home = router.order("key")[0]
    reach = Reach(router, deadline=60.0)

    assert reach.pick("key", 0.0) is None
    assert reach.pick("key", 0.0) is None
    assert answer_probes(reach, 0.0, INFO) == [home.address]
    assert reach.pick("key", 0.0) is home
    assert reach.start(0.0) == []


def test_the_next_on_the_ring_takes_over_and_the_group_comes_home() -> None:
    router = Router(["a:1", "b:1", "c:1"])
    home, second, _ = router.order("key")
    home.answered(INFO)
    second.answered(INFO)
    reach = Reach(router, deadline=60.0)
    reach.failed(home, LOST, now=0.0)

    assert reach.pick("key", 0.01) is second  # not due for a probe yet
    assert reach.start(0.01) == []
    assert reach.pick("key", 0.2) is second  # probed beside the work
    assert answer_probes(reach, 0.2, LOST) == [home.address]
    assert home.retry_at >= 0.2 + 0.1  # the second back-off
    assert reach.pick("key", 0.6) is second
    assert answer_probes(reach, 0.6, INFO) == [home.address]
    assert reach.pick("key", 0.6) is home


def test_a_new_call_asks_a_lone_server_again_although_it_failed_a_moment_ago() -> None:
    router = Router("a:1")
    Reach(router, deadline=60.0).failed(router.endpoints["a:1"], LOST, now=0.0)
    reach = Reach(router, deadline=60.0)

    assert reach.pick("key", 0.001) is None
    assert answer_probes(reach, 0.001, INFO) == ["a:1"]


def test_a_call_gives_up_when_every_server_failed_often_enough() -> None:
    router, now = Router(["a:1", "b:1"]), 0.0
    reach = Reach(router, deadline=1000.0)
    while reach.give_up(now) is None:
        reach.pick("key", now)
        answer_probes(reach, now, LOST)
        now += 0.5

    assert {reach.failures["a:1"], reach.failures["b:1"]} >= {MAX_FAILURES}
    assert isinstance(reach.give_up(now), RewardUnavailable)
    assert 5 < now < 60


def test_a_wrong_token_is_not_tried_twice() -> None:
    router = Router("a:1")
    reach = Reach(router, deadline=60.0)
    reach.pick("key", 0.0)
    answer_probes(reach, 0.0, Outcome(grpc.StatusCode.UNAUTHENTICATED, "wrong token"))

    assert isinstance(reach.give_up(0.0), AccessDenied)


def test_the_deadline_names_what_failed_last() -> None:
    reach = Reach(Router(["a:1"]), deadline=5.0)
    reach.failed(reach.router.endpoints["a:1"], LOST, now=0.0)

    assert reach.give_up(4.9) is None
    error = reach.give_up(5.0)
    assert isinstance(error, DeadlineExceeded)
    assert "a:1: connection refused" in str(error)


def test_a_server_that_does_not_answer_its_probe_is_lost() -> None:
    reach = Reach(Router(["a:1"]), deadline=60.0)
    reach.pick("key", 0.0)
    answer_probes(reach, 0.0, Outcome(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))

    assert reach.last
    assert reach.last[0] == Outcome(grpc.StatusCode.UNAVAILABLE, "no answer within 5.0 s")
