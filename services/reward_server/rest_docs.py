"""The OpenAPI page of the REST front door, with worked examples that a test runs."""

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from services.reward_server import rest_models as models
from services.reward_server.errors import (
    STATUS,
    DeadlinePassed,
    InvalidRequest,
    NotReady,
    Overloaded,
    RequestError,
    RequestTooLarge,
    Unauthenticated,
)

DEADLINE_HEADER = "x-deadline-s"
REF = "#/components/schemas/{model}"
REQUESTS: tuple[type[models.Model], ...] = (models.ScoreTurnsRequest, models.TextScoreRequest)
REFUSALS: tuple[type[RequestError], ...] = (
    InvalidRequest,
    Unauthenticated,
    RequestTooLarge,
    Overloaded,
    NotReady,
    DeadlinePassed,
)

IDS_EXAMPLE: dict[str, Any] = {
    "rollouts": [
        {
            "rollout_id": "r1",
            "group_id": "q1",
            "token_ids": [1, 2, 4],
            "prefix_ends": [1, 3],
            "answers": [{"token_ids": [5]}],
        }
    ],
    "options": {"token_logprobs": True},
}
# By tests' fake engine: the log-prob of a token is -(1 + sum of the ids so far mod 10) / 10.
IDS_REPLY: dict[str, Any] = {
    "scores": [
        {
            "rollout_id": "r1",
            "status": "ROLLOUT_STATUS_OK",
            "reason": "",
            "prefixes": [
                {"score": -0.7, "answers": [{"score": -0.7, "token_logprobs": [-0.7]}]},
                {"score": -0.3, "answers": [{"score": -0.3, "token_logprobs": [-0.3]}]},
            ],
            "gains": [0.4],
            "policy_version": 0,
            "route": "fake",
            "usage": {
                "tokens_total": 4,
                "tokens_unique": 3,
                "tokens_cached": 0,
                "tokens_computed": 3,
            },
            "answer_leaked": False,
        }
    ],
    "policy_version": 0,
    "route": "fake",
    "usage": {
        "tokens_total": 4,
        "tokens_unique": 3,
        "tokens_cached": 0,
        "tokens_computed": 3,
    },
}
TEXT_EXAMPLE: dict[str, Any] = {
    "rollouts": [
        {
            "rollout_id": "r1",
            "group_id": "q1",
            "messages": [
                {"role": "user", "content": "What is the capital of France?"},
                {"role": "assistant", "content": "<search>capital of France</search>"},
                {"role": "tool", "content": "Paris is the capital of France."},
                {"role": "assistant", "content": "<answer>\nParis\n</answer>"},
            ],
            "answers": ["Paris", "Paris, France"],
        }
    ],
    "wrapper": {
        "head": "<|im_start|>assistant\n<think>\nNow there's enough information to answer\n"
        "</think>\n<answer>\n",
        "tail": "\n</answer><|im_end|>\n",
    },
    "options": {"alias_rule": "ALIAS_RULE_MAX"},
}


def score_turns_docs() -> dict[str, Any]:
    """What FastAPI cannot see: the route reads its body itself, to stop where the limit is."""
    examples = {
        "ids": {"summary": "Token ids: prompt and two turns", "value": IDS_EXAMPLE},
        "text": {"summary": "Chat messages: search, then answer", "value": TEXT_EXAMPLE},
    }
    body = {"schema": {"anyOf": [_ref(form) for form in REQUESTS]}, "examples": examples}
    header = {
        "name": DEADLINE_HEADER,
        "in": "header",
        "description": "Seconds from now until the reply is of no use.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    }
    return {
        "summary": "Score every turn of many rollouts",
        "openapi_extra": {
            "requestBody": {"required": True, "content": {"application/json": body}},
            "parameters": [header],
        },
        "responses": {200: _reply_docs(), **_refusal_docs()},
        "response_model": None,
    }


def _reply_docs() -> dict[str, Any]:
    return {
        "description": "One score per rollout, in order; a bad rollout has a status of its own.",
        "model": models.ScoreTurnsResponse | models.TextScoreResponse,
        "content": {"application/json": {"examples": {"ids": {"value": IDS_REPLY}}}},
    }


def _refusal_docs() -> dict[int | str, dict[str, Any]]:
    said: dict[int | str, dict[str, Any]] = {}
    for error in REFUSALS:
        about = {"description": (error.__doc__ or "").strip(), "model": models.Problem}
        said[int(STATUS[error].http)] = about
    said[int(STATUS[Overloaded].http)]["headers"] = {
        "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}
    }
    return said


def add_request_models(app: FastAPI) -> None:
    """Put the models of the request forms onto the page, beside those FastAPI finds itself."""
    make_page = app.openapi

    def openapi() -> dict[str, Any]:
        page = make_page()
        _, found = models_json_schema([(form, "validation") for form in REQUESTS], ref_template=REF)
        schemas = page.setdefault("components", {}).setdefault("schemas", {})
        for name, schema in found["$defs"].items():
            schemas.setdefault(name, schema)
        return page

    app.openapi = openapi  # type: ignore[method-assign]


def _ref(model: type[models.Model]) -> dict[str, str]:
    return {"$ref": REF.format(model=model.__name__)}
