"""A real grpc.aio reward server over FakeEngine, for tests: numbers by hand, faults on request.

In a process of its own: `python -m tests.reward_double '{"port": 0, ...}'` prints its port. Faults
are changed while it runs by `Faults` sent as JSON, one line each, to its standard input.
"""

# ruff: noqa: N802 - the methods have the names of the wire

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import msgspec

from services.reward_server.engines import (
    AnswerIds,
    JobScore,
    SampleParams,
    SampleRequest,
    ScoreJob,
    Usage,
)
from services.reward_server.engines.fake_engine import FakeEngine
from services.reward_server.engines.session import ScoringSession
from turnwise.scores import AliasRule, GainKind, alias_score, answer_score, turn_gains
from turnwise.v1 import reward_pb2 as pb
from turnwise.v1 import reward_pb2_grpc

START_S = 20.0
FINISH = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "error": pb.FINISH_REASON_ERROR,
    None: pb.FINISH_REASON_UNSPECIFIED,
}


class Faults(msgspec.Struct):
    """What goes wrong from now on; counts are used up."""

    latency_s: float = 0.0  # before every ScoreTurns reply
    unavailable: int = 0  # so many calls of ScoreTurns, Sample or GetServerInfo fail
    exhausted: int = 0  # so many ScoreTurns or Sample calls are refused
    retry_after_s: float = 0.0  # of those; 0 sends no hint
    overloaded: int = 0  # so many rollouts get the status OVERLOADED
    hang: bool = False  # ScoreTurns, Sample and session steps never answer
    hang_info: bool = False  # GetServerInfo never answers
    break_after: int = 0  # Sample breaks off after so many messages; a session, so many steps
    versions: list[int] = []  # the version of each of the next ScoreTurns replies
    short_by: int = 0  # leave so many scores out of a reply
    bad_score: float | None = None  # sent instead of every score


class Double(msgspec.Struct):
    """How a server is set up."""

    port: int = 0
    token: str = ""
    tls: tuple[str, str] | None = None  # PEM texts of key and certificate
    client_ca: str = ""  # PEM text; set: clients need a certificate
    limits: dict[str, int] = {}
    policy_version: int = 0
    seconds_per_token: float = 0.0
    faults: Faults = msgspec.field(default_factory=Faults)


class Servicer(reward_pb2_grpc.RewardServiceServicer, reward_pb2_grpc.PolicyServiceServicer):
    """The wire over the engine, and the faults before it."""

    def __init__(self, setup: Double) -> None:
        self.setup, self.faults = setup, setup.faults
        self.engine = FakeEngine(
            policy_version=setup.policy_version,
            poison_id=99,
            seconds_per_token=setup.seconds_per_token,
        )
        self.requests: list[pb.ScoreTurnsRequest] = []
        self.infos = self.samples = self.steps = 0
        self.memory: dict[str, pb.ScoreTurnsResponse] = {}
        self.flying = self.most_flying = 0

    async def GetServerInfo(self, request: Any, context: Any) -> pb.GetServerInfoResponse:
        self.infos += 1
        await self._admit(context, "unavailable")
        await self._hang(self.faults.hang_info)
        version, limits = self.engine.policy_version, pb.ServerLimits(**self.setup.limits)
        return pb.GetServerInfoResponse(
            engine="fake", route="fake", policy_version=version, vocab_size=100, limits=limits
        )

    async def ScoreTurns(self, request: pb.ScoreTurnsRequest, context: Any) -> Any:
        self.requests.append(request)
        await self._admit(context, "unavailable", "exhausted")
        self.flying += 1
        self.most_flying = max(self.flying, self.most_flying)
        try:
            await self._hang(self.faults.hang)
            await asyncio.sleep(self.faults.latency_s)
            return await self._answer(request)
        finally:
            self.flying -= 1

    async def _answer(self, request: pb.ScoreTurnsRequest) -> pb.ScoreTurnsResponse:
        known = self.memory.get(request.idempotency_key)
        if known is not None:
            return known
        if self.faults.versions:
            self.engine.policy_version = self.faults.versions.pop(0)
        wanted = request.options.min_policy_version
        self.engine.policy_version = max(self.engine.policy_version, wanted)
        result = await self.engine.score([to_job(rollout) for rollout in request.rollouts])
        scores = [
            self._score(rollout.rollout_id, job, request.options, result.policy_version)
            for rollout, job in zip(request.rollouts, result.jobs, strict=True)
        ]
        version = result.policy_version
        reply = pb.ScoreTurnsResponse(
            scores=scores[: len(scores) - self.faults.short_by],
            policy_version=version,
            route="fake",
            usage=to_usage(result.usage),
        )
        self.memory[request.idempotency_key] = reply
        return reply

    def _score(
        self, name: str, job: JobScore, options: pb.ScoreOptions, version: int
    ) -> pb.RolloutScore:
        if self.faults.overloaded:
            self.faults.overloaded -= 1
            status = pb.ROLLOUT_STATUS_OVERLOADED
            return pb.RolloutScore(rollout_id=name, status=status, reason="no room")
        score = to_score(name, job, options, version)
        for prefix in score.prefixes if self.faults.bad_score is not None else ():
            prefix.score = self.faults.bad_score or 0.0
        return score

    async def ScoreSession(
        self, requests: Any, context: Any
    ) -> AsyncIterator[pb.ScoreSessionResponse]:
        await self._admit(context, "unavailable")
        session: ScoringSession | None = None
        first, options, before = pb.SessionOpen(), pb.ScoreOptions(), 0.0
        async for request in requests:
            self.steps += 1
            await self._hang(self.faults.hang)
            if self.faults.break_after and self.steps > self.faults.break_after:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")
            if request.HasField("open"):
                first, options = request.open, request.open.options
                session = ScoringSession(self.engine, [to_answer(a) for a in first.answers])
            if session is None:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "open a session first")
                return
            if request.HasField("close"):
                job = ScoreJob(session.token_ids, session.prefix_ends, session.answers)
                result = await self.engine.score([job])
                whole = to_score(first.rollout_id, result.jobs[0], options, result.policy_version)
                yield pb.ScoreSessionResponse(score=whole)
                return
            ids = request.open.token_ids or request.extend.token_ids
            if self.faults.versions:
                self.engine.policy_version = self.faults.versions.pop(0)
            update = await session.extend(ids)
            score = to_score(first.rollout_id, update.score, options, update.policy_version)
            if update.first_prefix:
                score.gains.append(score.prefixes[0].score - before)
            before = score.prefixes[-1].score
            yield pb.ScoreSessionResponse(
                score=score, first_prefix=update.first_prefix, provisional=True
            )

    async def Sample(self, request: pb.SampleRequest, context: Any) -> Any:
        self.samples += 1
        await self._admit(context, "unavailable", "exhausted")
        await self._hang(self.faults.hang)
        params = SampleParams(request.params.max_tokens or 8, n=request.params.n or 1)
        sent = 0
        for index, prompt in enumerate(request.prompts):
            job = SampleRequest(tuple(prompt.token_ids), params)
            async for chunk in self.engine.sample(job):
                if self.faults.break_after and sent >= self.faults.break_after:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")
                sent += 1
                yield pb.SampleResponse(
                    prompt_id=prompt.prompt_id,
                    prompt_index=index,
                    sequence_index=chunk.index,
                    token_ids=chunk.token_ids,
                    logprobs=chunk.logprobs,
                    finish_reason=FINISH[chunk.finish_reason],
                    reason=chunk.reason,
                    policy_version=chunk.policy_version,
                )

    async def LoadPolicy(self, request: pb.LoadPolicyRequest, context: Any) -> Any:
        self.engine.policy_version = request.policy_version
        return pb.LoadPolicyResponse(policy_version=request.policy_version)

    async def _admit(self, context: Any, *kinds: str) -> None:
        """Check the token, then use up one fault of the kinds."""
        given = dict(context.invocation_metadata()).get("authorization", "")
        if self.setup.token and given != f"Bearer {self.setup.token}":
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong token")
        for kind in kinds:
            if getattr(self.faults, kind):
                setattr(self.faults, kind, getattr(self.faults, kind) - 1)
                hint = (("retry-after-ms", f"{round(1000 * self.faults.retry_after_s)}"),)
                context.set_trailing_metadata(hint if self.faults.retry_after_s else ())
                full = kind == "exhausted"
                code = "RESOURCE_EXHAUSTED" if full else "UNAVAILABLE"
                await context.abort(grpc.StatusCode[code], f"a fault: {kind}")

    async def _hang(self, hangs: bool) -> None:
        if hangs:
            await asyncio.Event().wait()


def to_answer(answer: pb.Answer) -> AnswerIds:
    end = answer.scored_end or len(answer.token_ids)
    return AnswerIds(tuple(answer.token_ids), answer.scored_start, end)


def to_job(rollout: pb.Rollout) -> ScoreJob:
    answers = tuple(to_answer(a) for a in rollout.answers)
    return ScoreJob(tuple(rollout.token_ids), tuple(rollout.prefix_ends), answers)


def to_usage(usage: Usage) -> pb.Usage:
    return pb.Usage(**msgspec.structs.asdict(usage))


def to_score(name: str, job: JobScore, options: pb.ScoreOptions, version: int) -> pb.RolloutScore:
    """The arithmetic of the real server, with the rules of turnwise.credit."""
    kinds: list[GainKind] = ["log_prob", "log_prob", "prob"]
    rules: list[AliasRule] = ["max", "first", "max", "logsumexp", "mean"]
    rows = [[answer_score(tokens) for tokens in row] for row in job.logprobs]
    scores = [alias_score(row, rules[options.alias_rule]) for row in rows]
    prefixes = [
        pb.PrefixScore(
            score=score,
            answers=[
                pb.AnswerScore(score=s, token_logprobs=tokens if options.token_logprobs else ())
                for s, tokens in zip(row, logprobs, strict=True)
            ],
        )
        for score, row, logprobs in zip(scores, rows, job.logprobs, strict=True)
    ]
    return pb.RolloutScore(
        rollout_id=name,
        status=pb.RolloutStatus.Value(f"ROLLOUT_STATUS_{job.status}"),
        reason=job.reason,
        prefixes=prefixes,
        gains=[gain or 0.0 for gain in turn_gains(scores, kinds[options.gain_kind])]
        if scores
        else (),
        policy_version=version,
        route="fake",
        usage=to_usage(job.usage),
    )


class Serving(msgspec.Struct):
    """A server inside this process, and what it saw."""

    servicer: Servicer
    server: Any
    port: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


async def serve(setup: Double) -> Serving:
    limit = setup.limits.get("max_request_bytes", 64 << 20)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", limit)])
    servicer = Servicer(setup)
    reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server)
    reward_pb2_grpc.add_PolicyServiceServicer_to_server(servicer, server)
    address = f"127.0.0.1:{setup.port}"
    if setup.tls:
        key, certificate = (text.encode() for text in setup.tls)
        root = setup.client_ca.encode() or None
        pair = [(key, certificate)]
        credentials = grpc.ssl_server_credentials(pair, root, require_client_auth=bool(root))
        port = server.add_secure_port(address, credentials)
    else:
        port = server.add_insecure_port(address)
    await server.start()
    return Serving(servicer, server, port)


class Process(msgspec.Struct):
    """A server in a process of its own."""

    popen: subprocess.Popen[str]
    port: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def set(self, **faults: Any) -> None:
        """Change the faults, and wait until they hold."""
        assert self._ask(json.dumps(faults)) == "set\n"

    def reset(self, **setup: Any) -> None:
        """Forget faults, version and what was seen; serve with another token or other limits."""
        assert self._ask("reset " + json.dumps(setup)) == "set\n"

    def stats(self) -> dict[str, Any]:
        """What it saw: requests (group ids, rollout ids, key, bytes), calls by kind."""
        stats: dict[str, Any] = json.loads(self._ask("stats"))
        return stats

    def _ask(self, line: str) -> str:
        assert self.popen.stdin
        assert self.popen.stdout
        print(line, file=self.popen.stdin, flush=True)
        return self.popen.stdout.readline()


@contextmanager
def processes(*setups: Double) -> Iterator[Sequence[Process]]:
    """Start one server per setup, all at once; kill them at the end."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.reward_double", msgspec.json.encode(setup).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for setup in setups
    ]
    try:
        ports = [int(popen.stdout.readline()) for popen in started if popen.stdout]
        yield [Process(popen, port) for popen, port in zip(started, ports, strict=True)]
    finally:
        for popen in started:
            popen.kill()
            popen.communicate()


async def main(setup: Double) -> None:
    """Serve until standard input ends."""
    serving = await serve(setup)
    print(serving.port, flush=True)
    servicer = serving.servicer
    while line := await asyncio.to_thread(sys.stdin.readline):
        if line == "stats\n":
            print(json.dumps(stats_of(servicer)), flush=True)
        elif line.startswith("reset "):
            Servicer.__init__(servicer, msgspec.json.decode(line[6:], type=Double))
            print("set", flush=True)
        else:
            servicer.faults = msgspec.convert(json.loads(line), Faults)
            print("set", flush=True)


def stats_of(servicer: Servicer) -> dict[str, Any]:
    return {
        "requests": [
            {
                "groups": [rollout.group_id for rollout in request.rollouts],
                "rollouts": [rollout.rollout_id for rollout in request.rollouts],
                "key": request.idempotency_key,
                "bytes": request.ByteSize(),
                "min_version": request.options.min_policy_version,
            }
            for request in servicer.requests
        ],
        "infos": servicer.infos,
        "samples": servicer.samples,
        "steps": servicer.steps,
        "flying": servicer.flying,
        "most_flying": servicer.most_flying,
    }


if __name__ == "__main__":
    asyncio.run(main(msgspec.json.decode(sys.argv[1].encode(), type=Double)))
