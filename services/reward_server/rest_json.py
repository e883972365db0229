"""JSON <-> protobuf, by protobuf's own rules: what it refuses, the message names."""

import json
from collections.abc import Iterable
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from pydantic import ValidationError

from services.reward_server.errors import InvalidRequest
from services.reward_server.rest_models import TextPart
from turnwise.v1 import reward_pb2 as pb

TEXT_FIELDS = frozenset(TextPart.model_fields)
WIDE = (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)
MOST_PROBLEM_CHARS = 500  # protobuf repeats values, and they can be long
NARROW = frozenset({"PrefixScore", "Answer", "TokenSpan"})  # hold no 64-bit number


def parse_json(body: bytes) -> dict[str, Any]:
    try:
        call = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    if not isinstance(call, dict):
        raise InvalidRequest("the body is not a JSON object")
    return call


def is_text_form(call: dict[str, Any]) -> bool:
    """Whether anything in it is only in the text form."""
    rollouts = call.get("rollouts")
    if "wrapper" in call or "tools" in call:
        return True
    return isinstance(rollouts, list) and any(
        isinstance(rollout, dict) and "messages" in rollout for rollout in rollouts
    )


def parse(call: dict[str, Any], message: pb.ScoreTurnsRequest) -> pb.ScoreTurnsRequest:
    try:
        return json_format.ParseDict(call, message)
    except json_format.ParseError as error:
        # The lines after the first list field names that are not the proto's.
        raise InvalidRequest(str(error).splitlines()[0][:MOST_PROBLEM_CHARS]) from error


def parse_text(call: dict[str, Any]) -> TextPart:
    part = {name: value for name, value in call.items() if name in TEXT_FIELDS}
    try:
        return TextPart.model_validate(part)
    except ValidationError as errors:
        error = errors.errors(include_url=False, include_input=False)[0]
        place = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in error["loc"])
        problem = "unknown field" if error["type"] == "extra_forbidden" else error["msg"]
        raise InvalidRequest(f"{place.lstrip('.')}: {problem}"[:MOST_PROBLEM_CHARS]) from errors


def to_json(reply: pb.ScoreTurnsResponse, rollouts: Iterable[pb.Rollout] | None) -> bytes:
    """`rollouts`: the ids form of a text form."""
    said = to_dict(reply)
    if rollouts is not None:
        said["rollouts"] = [to_dict(rollout) for rollout in rollouts]
    return json.dumps(said, separators=(",", ":"), allow_nan=False).encode()


def to_dict(message: Message) -> dict[str, Any]:
    """With the names of the proto, zeros said, and 64-bit numbers as numbers."""
    said: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    _widen(said, message.DESCRIPTOR)
    return said


def _widen(said: dict[str, Any], descriptor: Any) -> None:
    """protobuf writes 64-bit numbers as strings."""
    for field in descriptor.fields:
        value = said.get(field.name)
        if value is None:
            continue
        if field.cpp_type in WIDE:
            said[field.name] = int(value)
        elif field.message_type is not None and field.message_type.name not in NARROW:
            for part in value if isinstance(value, list) else [value]:
                _widen(part, field.message_type)
