"""Logging: a fixed event with ids as fields, as readable text or JSON lines, secrets masked.

    log.info("group pushed", extra={"group_id": group.id, "backlog_groups": backlog})

Every record is one line on stderr with its time in UTC; a traceback follows it in text, and is
one more field in JSON.
"""

import json
import logging
from collections.abc import Collection
from datetime import UTC, datetime
from math import isfinite
from typing import Any, Literal

MASK = "***"
# What logging itself sets on a record; everything else came in through `extra`.
OWN_NAMES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def setup_logging(
    level: str, log_format: Literal["text", "json"], secrets: Collection[str] = ()
) -> None:
    """Send the records of this process at or above `level` to stderr, secrets masked."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(log_format, secrets))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class LineFormatter(logging.Formatter):
    """Renders a record as one line, and masks secrets wherever in its values they stand."""

    def __init__(self, log_format: Literal["text", "json"], secrets: Collection[str]) -> None:
        super().__init__()
        self.log_format = log_format
        # As they are, and as they look inside a repr or inside JSON; the longest first.
        forms = {form for text in secrets for form in (text, repr(text)[1:-1], _quoted(text)[1:-1])}
        self.secrets = sorted(forms - {""}, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        # The names of the fields stand in our code: a short secret must not break them.
        fields = {name: self.masked(value) for name, value in _fields(record).items()}
        return json.dumps(fields) if self.log_format == "json" else _text(fields)

    def masked(self, value: Any) -> Any:
        """Return the value as plain JSON types without a secret, a NaN or an unknown object."""
        if isinstance(value, dict):
            return {self.masked(str(key)): self.masked(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.masked(inner) for inner in value]
        if (
            value is None
            or isinstance(value, int)
            or (isinstance(value, float) and isfinite(value))
        ):
            return value
        text = str(value)
        for secret in self.secrets:
            text = text.replace(secret, MASK)
        return text


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    fields = {
        "time": time.replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": record.getMessage(),
    }
    for name, value in vars(record).items():
        if name not in OWN_NAMES:
            fields[f"{name}_" if name in fields else name] = value
    if record.exc_info:
        fields["exception"] = logging.Formatter().formatException(record.exc_info)
    return fields


def _text(fields: dict[str, Any]) -> str:
    time, level, logger, event = (fields.pop(name) for name in ("time", "level", "logger", "event"))
    exception = fields.pop("exception", None)
    event = event if event.isprintable() else _quoted(event)
    line = f"{time} {level:8}{logger}: {event}"
    for name, value in fields.items():
        bare = isinstance(value, str) and value.isprintable() and value and " " not in value
        line += f" {name}={value if bare else _quoted(value)}"
    return f"{line}\n{exception}" if exception else line


def _quoted(value: Any) -> str:
    return json.dumps(value)
