"""Turns: by tokens served; who comes new starts level with the one served last."""

from collections import Counter

from services.reward_server.fair_queue import FairQueue


class Call:
    def __init__(self, name: str, client: str, jobs: int, cost: int = 1) -> None:
        self.name, self.client, self.jobs, self.cost = name, client, jobs, cost

    def has_work(self) -> bool:
        return self.jobs > 0


def serve(queue: FairQueue[Call], jobs: int) -> str:
    """Serve so many jobs; the names of their calls."""
    names = ""
    for _ in range(jobs):
        call = queue.pop()
        if call is None:
            return names
        call.jobs -= 1
        queue.served(call, call.cost)
        names += call.name
    return names


def queue_of(*calls: Call) -> FairQueue[Call]:
    queue: FairQueue[Call] = FairQueue()
    for call in calls:
        queue.add(call)
    return queue


def test_a_small_call_passes_a_huge_one() -> None:
    queue = queue_of(Call("h", "huge", 1000))
    assert serve(queue, 100) == "h" * 100

    queue.add(Call("s", "small", 2))

    assert serve(queue, 4).count("s") == 2


def test_clients_share_by_tokens_not_by_jobs() -> None:
    queue = queue_of(Call("a", "1", 100, cost=10), Call("b", "2", 100, cost=30))

    served = Counter(serve(queue, 40))

    assert served == {"a": 30, "b": 10}


def test_many_calls_of_one_client_count_as_one_client() -> None:
    calls = [Call("m", "many", 10) for _ in range(10)]

    served = Counter(serve(queue_of(*calls, Call("o", "one", 100)), 20))

    assert served == {"m": 10, "o": 10}


def test_calls_of_one_client_take_turns_too() -> None:
    queue = queue_of(Call("a", "c", 3), Call("b", "c", 3))

    assert serve(queue, 6) == "ababab"


def test_a_call_that_lost_its_work_is_passed_over() -> None:
    gone, kept = Call("g", "x", 5), Call("k", "y", 1)
    queue = queue_of(gone, kept)
    gone.jobs = 0

    assert serve(queue, 9) == "k"
    assert queue.pop() is None


def test_an_empty_queue_forgets_its_clients() -> None:
    queue = queue_of(*[Call("x", f"client {i}", 1) for i in range(5)])

    assert serve(queue, 9) == "xxxxx"
    assert not queue._calls
