"""REST says what gRPC says: the same names on the page, the same numbers in a reply."""

import json
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st

from services.reward_server import rest_models
from services.reward_server.errors import InvalidRequest
from services.reward_server.rest_docs import TEXT_EXAMPLE
from tests.rest_stand import PATH, get, post, rest_stand
from tests.reward_stand import Stand
from tests.scoring import run
from turnwise.v1 import reward_pb2 as pb


async def test_the_page_shows_both_forms_and_has_no_loose_end() -> None:
    page = (await get(rest_stand(), "/openapi.json")).json()

    post_docs = page["paths"][PATH]["post"]
    content = post_docs["requestBody"]["content"]["application/json"]
    assert [form["$ref"].split("/")[-1] for form in content["schema"]["anyOf"]] == [
        "ScoreTurnsRequest",
        "TextScoreRequest",
    ]
    assert content["examples"]["text"]["value"] == TEXT_EXAMPLE
    assert {"200", "400", "401", "413", "429", "503", "504"} <= set(post_docs["responses"])
    text = json.dumps(page)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in page["components"]["schemas"]


NAMES = [
    "TokenSpan",
    "Answer",
    "Rollout",
    "ScoreOptions",
    "ScoreTurnsRequest",
    "Usage",
    "AnswerScore",
    "PrefixScore",
    "RolloutScore",
    "ScoreTurnsResponse",
    "ServerLimits",
]
WIRE = {
    "ServerInfo": "GetServerInfoResponse",
    **{name: name for name in NAMES},
}


@pytest.mark.parametrize("model_name", WIRE)
def test_the_models_have_the_fields_of_the_wire(model_name: str) -> None:
    fields = getattr(rest_models, model_name).model_fields
    assert list(fields) == [f.name for f in getattr(pb, WIRE[model_name]).DESCRIPTOR.fields]


@pytest.mark.parametrize(
    ("literal", "enum"),
    [
        (rest_models.GainKind, pb.GainKind),
        (rest_models.AliasRule, pb.AliasRule),
        (rest_models.ScorerName, pb.Scorer),
        (rest_models.StatusName, pb.RolloutStatus),
    ],
)
def test_the_models_have_the_names_of_the_wire(literal: Any, enum: Any) -> None:
    assert list(literal.__args__) == enum.keys()


ids = st.lists(st.integers(0, 110), max_size=6)
answers = st.builds(
    pb.Answer, token_ids=ids, scored_start=st.integers(0, 2), scored_end=st.integers(0, 4)
)
rollouts = st.builds(
    pb.Rollout,
    rollout_id=st.text(max_size=3),
    token_ids=ids,
    prefix_ends=st.lists(st.integers(0, 7), max_size=3, unique=True).map(sorted),
    answers=st.lists(answers, max_size=2),
)
options = st.builds(
    pb.ScoreOptions,
    gain_kind=st.integers(0, 3),
    alias_rule=st.integers(0, 5),
    token_logprobs=st.booleans(),
)
requests = st.builds(pb.ScoreTurnsRequest, rollouts=st.lists(rollouts, max_size=3), options=options)


def read(reply: dict[str, Any]) -> pb.ScoreTurnsResponse:
    return json_format.ParseDict(reply, pb.ScoreTurnsResponse())


async def direct(request: pb.ScoreTurnsRequest) -> object:
    try:
        return await Stand().handlers.score_turns(request)
    except InvalidRequest as error:
        return str(error)


@settings(max_examples=60, deadline=None)
@given(requests)
def test_rest_and_grpc_say_the_same_numbers(request: pb.ScoreTurnsRequest) -> None:
    async def both() -> None:
        body = json_format.MessageToDict(request, preserving_proto_field_name=True)
        rest = await post(Stand(), body)
        said: object = rest.json()["detail"] if rest.status_code == 400 else read(rest.json())
        assert said == await direct(request)

    run(both())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                [
                    "rollouts",
                    "options",
                    "wrapper",
                    "head",
                    "messages",
                    "role",
                    "answers",
                    "token_ids",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["rollouts", "options", "wrapper", "tools"]), json_values))
def test_no_json_is_an_error_of_the_server(body: dict[str, Any]) -> None:
    reply = run(post(Stand(), body))
    assert reply.status_code in (200, 400)
