"""The text form through the REST front door."""

import json
from pathlib import Path

import pytest

from services.reward_server import rest_models
from services.reward_server.rest_docs import TEXT_EXAMPLE
from tests import chat_tokenizer
from tests.chat_tokenizer import FORGETFUL, make_tokenizer
from tests.rest_stand import VOCAB, post, rest_stand, text_handlers
from tests.reward_stand import Stand


@pytest.fixture
def stand() -> Stand:
    return rest_stand()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(directory)
    return directory


async def test_the_text_form_scores_as_the_ids_it_returns(stand: Stand, model: Path) -> None:
    handlers = text_handlers(stand, model)
    said = await post(stand, TEXT_EXAMPLE, handlers)
    assert said.status_code == 200
    text = rest_models.TextScoreResponse.model_validate(said.json())

    ids = await post(stand, {"rollouts": said.json()["rollouts"]})

    assert said.json()["scores"] == ids.json()["scores"]
    assert [score.status for score in text.scores] == ["ROLLOUT_STATUS_OK"]
    (rollout,) = text.rollouts
    messages = TEXT_EXAMPLE["rollouts"][0]["messages"]
    tokenizer = make_tokenizer()
    assert rollout.token_ids == tokenizer.encode(
        tokenizer.apply_chat_template(messages, tokenize=False)
    )
    after_tool = tokenizer.apply_chat_template(messages[:3], tokenize=False)
    assert rollout.prefix_ends[1] == len(tokenizer.encode(after_tool))


async def test_a_text_rollout_that_cannot_be_rendered_is_invalid_alone(
    stand: Stand, model: Path
) -> None:
    (good,) = TEXT_EXAMPLE["rollouts"]
    bad = {**good, "rollout_id": "bad", "messages": good["messages"][1:]}
    reply = await post(
        stand, {**TEXT_EXAMPLE, "rollouts": [good, bad]}, text_handlers(stand, model)
    )

    fine, poor = reply.json()["scores"]
    assert (fine["status"], poor["status"]) == ("ROLLOUT_STATUS_OK", "ROLLOUT_STATUS_INVALID")
    assert (poor["rollout_id"], poor["reason"][:12]) == ("bad", "messages[0]:")


@pytest.mark.parametrize(
    ("template", "status", "problem"),
    [(None, 400, "no chat template"), (FORGETFUL, 200, "messages[1] (turn 1): the chat template")],
)
async def test_a_template_that_will_not_do_is_said(
    stand: Stand, tmp_path: Path, template: str | None, status: int, problem: str
) -> None:
    make_tokenizer(template).save_pretrained(tmp_path)
    body = json.loads(json.dumps(TEXT_EXAMPLE))
    body["rollouts"][0]["messages"][1]["reasoning_content"] = "hm"

    reply = await post(stand, body, text_handlers(stand, tmp_path))

    assert reply.status_code == status
    assert problem in reply.text


async def test_too_many_text_rollouts_are_refused_before_they_cost(
    stand: Stand, model: Path
) -> None:
    body = {**TEXT_EXAMPLE, "rollouts": TEXT_EXAMPLE["rollouts"] * 2}
    reply = await post(stand, body, text_handlers(stand, model, max_rollouts=1))

    assert (reply.status_code, "max_rollouts=1" in reply.text) == (400, True)


def test_the_fake_engine_knows_every_token() -> None:
    assert chat_tokenizer.VOCAB == VOCAB
