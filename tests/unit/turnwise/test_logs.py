"""Log lines: an event, its fields, UTC, one line each, and no secret anywhere."""

import json
import logging
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from turnwise.logs import LineFormatter, setup_logging

SECRET = "tok\"en'\n1"


@pytest.fixture(autouse=True)
def _root_as_before() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


def line(
    log_format: Literal["text", "json"], event: str, exc_info: Any = None, **extra: object
) -> str:
    record = logging.getLogger("turnwise.queue").makeRecord(
        "turnwise.queue", logging.INFO, "x.py", 1, event, (), exc_info, extra=extra
    )
    record.created = 1_700_000_000.25  # 2023-11-14 22:13:20.25 UTC
    return LineFormatter(log_format, [SECRET, ""]).format(record)


def test_json_has_time_level_logger_event_and_the_fields() -> None:
    assert json.loads(line("json", "group pushed", group_id="g1", backlog_groups=3)) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "info",
        "logger": "turnwise.queue",
        "event": "group pushed",
        "group_id": "g1",
        "backlog_groups": 3,
    }


def test_text_is_readable_and_quotes_what_would_break_the_line() -> None:
    assert line("text", "group pushed", group_id="g1", path="a b", score=-1.5) == (
        '2023-11-14T22:13:20.250Z info    turnwise.queue: group pushed group_id=g1 path="a b" '
        "score=-1.5"
    )
    assert "\n" not in line("text", "first\nsecond", path="x\r\ny\u2028z")


def test_json_is_valid_whatever_a_field_holds() -> None:
    fields = {"nan": float("nan"), "seen": {1}, "where": [("a", None)], "level": "own"}

    decoded = json.loads(line("json", "odd", **fields), parse_constant=pytest.fail)

    assert decoded["nan"] == "nan"
    assert decoded["seen"] == "{1}"
    assert decoded["where"] == [["a", None]]
    assert (decoded["level"], decoded["level_"]) == ("info", "own")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_secret_is_masked_wherever_it_stands(log_format: Literal["text", "json"]) -> None:
    try:
        raise KeyError(SECRET)
    except KeyError as error:
        exc_info = (KeyError, error, error.__traceback__)
    headers = {"authorization": f"Bearer {SECRET}", SECRET: [SECRET, (SECRET,)]}

    text = line(log_format, f"sent {SECRET}", exc_info, headers=headers, body=json.dumps([SECRET]))

    assert "tok" not in text
    assert "en'" not in text
    assert "Bearer ***" in text
    assert "KeyError: '***'" in text


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_short_secret_does_not_break_the_names_of_fields(
    log_format: Literal["text", "json"], capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging("info", log_format, ["event", "id"])
    logging.getLogger("turnwise.test").info("an event", extra={"group_id": "id7"})

    err = capsys.readouterr().err
    assert "an ***" in err
    assert ("group_id=***7" if log_format == "text" else '"group_id": "***7"') in err


def test_an_exception_is_one_json_line() -> None:
    try:
        raise RuntimeError("two\nlines")
    except RuntimeError as error:
        text = line("json", "failed", (RuntimeError, error, error.__traceback__))

    assert "\n" not in text
    assert json.loads(text)["exception"].endswith("RuntimeError: two\nlines")


def test_setup_sends_one_copy_above_the_level_to_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    setup_logging("error", "json")
    setup_logging("info", "json", secrets=["s3cret"])
    log = logging.getLogger("turnwise.test")
    log.debug("not shown")
    log.info("shown %s", "s3cret", extra={"group_id": "g1"})

    out, err = capsys.readouterr()
    assert out == ""
    assert [json.loads(row)["event"] for row in err.splitlines()] == ["shown ***"]
