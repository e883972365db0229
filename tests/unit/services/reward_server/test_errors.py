"""One table says what every error is on the wire."""

import grpc

from services.reward_server.errors import STATUS, RequestError


def test_the_table_knows_every_error() -> None:
    assert set(STATUS) == set(RequestError.__subclasses__())


def test_only_what_a_client_may_retry_has_a_status_that_says_so() -> None:
    retried = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}

    names = {error.__name__ for error, status in STATUS.items() if status.grpc in retried}

    assert names == {"NotReady", "Overloaded"}
    assert {STATUS[e].http for e in STATUS if e.__name__ in names} == {429, 503}
