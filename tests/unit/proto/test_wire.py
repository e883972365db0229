"""The wire: every element is documented, and the stubs carry what a reply must prove."""

import re
from collections.abc import Iterator
from pathlib import Path

import grpc_tools
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

from turnwise.v1 import reward_pb2 as pb

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> FileDescriptorProto:
    out = tmp_path_factory.mktemp("proto") / "set.bin"
    arguments = [
        "protoc",
        f"-I{ROOT / 'proto'}",
        f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
    ]
    arguments += [
        "--include_source_info",
        f"--descriptor_set_out={out}",
        "turnwise/v1/reward.proto",
    ]
    assert protoc.main(arguments) == 0
    return FileDescriptorSet.FromString(out.read_bytes()).file[0]


def elements(file: FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    """Path (as in descriptor.proto) and name of everything a reader wants explained."""
    for m, message in enumerate(file.message_type):
        yield (4, m), message.name
        for f, field in enumerate(message.field):
            yield (4, m, 2, f), f"{message.name}.{field.name}"
    for e, enum in enumerate(file.enum_type):
        yield (5, e), enum.name
        for v, value in enumerate(enum.value):
            yield (5, e, 2, v), value.name
    for s, service in enumerate(file.service):
        yield (6, s), service.name
        for r, method in enumerate(service.method):
            yield (6, s, 2, r), f"{service.name}.{method.name}"


def test_everything_has_a_comment(described: FileDescriptorProto) -> None:
    comments = {
        tuple(location.path): location.leading_comments + location.trailing_comments
        for location in described.source_code_info.location
    }

    silent = [name for path, name in elements(described) if not comments.get(path, "").strip()]

    assert silent == []
    assert len(list(elements(described))) > 100


ZERO = re.compile(r"\b0\b|unset|empty|unspecified|false|never", re.IGNORECASE)


def test_every_single_value_says_what_zero_means(described: FileDescriptorProto) -> None:
    comments = {
        tuple(location.path): location.trailing_comments
        for location in described.source_code_info.location
    }
    silent, seen = [], 0
    for m, message in enumerate(described.message_type):
        for f, field in enumerate(message.field):
            single = field.label != field.LABEL_REPEATED and field.type != field.TYPE_MESSAGE
            seen += single
            if single and not ZERO.search(comments[4, m, 2, f]):
                silent.append(f"{message.name}.{field.name}")

    assert silent == []
    assert seen > 50


def test_unset_options_are_told_from_zero() -> None:
    params = pb.SamplingParams(temperature=0.0)

    again = pb.SamplingParams.FromString(params.SerializeToString())

    assert again.HasField("temperature")
    assert not again.HasField("top_p")
    assert not again.HasField("seed")


def test_a_reply_survives_the_wire() -> None:
    score = pb.RolloutScore(
        rollout_id="r1",
        status=pb.ROLLOUT_STATUS_OK,
        prefixes=[pb.PrefixScore(score=-2.0), pb.PrefixScore(score=-0.2)],
        gains=[1.8],
        policy_version=2**40,
        route="trie",
        usage=pb.Usage(tokens_total=10, tokens_unique=7, tokens_cached=3, tokens_computed=4),
    )
    reply = pb.ScoreTurnsResponse(scores=[score], policy_version=2**40, route="trie")

    again = pb.ScoreTurnsResponse.FromString(reply.SerializeToString())

    assert [prefix.score for prefix in again.scores[0].prefixes] == [-2.0, -0.2]
    assert again.scores[0].policy_version == 1_099_511_627_776
    usage = again.scores[0].usage
    assert usage.tokens_cached + usage.tokens_computed == usage.tokens_unique
