"""What to ask vLLM for one prefix and answer on each route, and how to read its reply."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from services.reward_server.engines import JobScore, Route, ScoreJob
from services.reward_server.engines.usage import Run, count_tokens
from services.reward_server.engines.vllm_forced import FORCED_IDS
from services.reward_server.engines.vllm_plan import PlannedRequest, Use

MAX_LOGPROB = 1e-6  # rounding may lift the log-prob of a certain token this far above zero

Reply = tuple[float, ...] | str  # log-probs of the forced ids, or what is wrong with the reply


def weights_label(policy_version: int) -> str:
    """Return the name under which vLLM marks its outputs with the weights it used."""
    return f"v{policy_version}"


def score_prompt(route: Route, job: ScoreJob, request: PlannedRequest) -> list[int]:
    prefix = job.token_ids[: job.prefix_ends[request.uses[0].prefix]]
    return [*prefix, *request.forced] if route == "prompt_logprobs" else list(prefix)


def score_params(route: Route, forced: tuple[int, ...]) -> SamplingParams:
    common: dict[str, Any] = {
        "temperature": 0.0,
        "ignore_eos": True,
        "detokenize": False,  # with it, ids that vLLM has not computed would be decoded
        "flat_logprobs": True,
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    if route == "prompt_logprobs":
        # vLLM reads no cached block for such a request, and runs the last token as well.
        return SamplingParams(max_tokens=1, prompt_logprobs=0, **common)
    common |= {"max_tokens": len(forced), "logprobs": 0}
    if route == "trace_replay":
        return SamplingParams(trace_decode_token_ids=list(forced), **common)
    return SamplingParams(extra_args={FORCED_IDS: list(forced)}, **common)


def read_reply(route: Route, forced: tuple[int, ...], output: Any, weights: str) -> Reply:
    """Return the log-probs of the forced ids, or the reason why the output is no score."""
    sequence = output.outputs[0]
    if sequence.finish_reason != "length":
        return f"vLLM ended the request early: {sequence.finish_reason}"
    if problem := wrong_weights(sequence, weights):
        return problem
    reported = output.prompt_logprobs if route == "prompt_logprobs" else sequence.logprobs
    if reported is None:
        return "vLLM returned no log-probs"
    ids, logprobs = reported.token_ids[-len(forced) :], reported.logprobs[-len(forced) :]
    if tuple(ids) != forced:
        return f"vLLM returned log-probs of other tokens than the answer's {len(forced)}"
    return bad_logprob(logprobs) or tuple(logprobs)


def wrong_weights(sequence: Any, weights: str) -> str:
    """Return what is wrong if a finished sequence was not sampled by just these weights."""
    versions = {span.version for span in sequence.weight_versions or ()}
    return "" if versions == {weights} else f"vLLM used weights {sorted(versions)}, not {weights}"


def bad_logprob(logprobs: Sequence[float]) -> str:
    for logprob in logprobs:
        if not isfinite(logprob) or logprob > MAX_LOGPROB:
            return f"vLLM returned a log-prob of {logprob}"
    return ""


def job_scores(
    jobs: Sequence[ScoreJob],
    invalid: Mapping[int, str],
    requests: Sequence[PlannedRequest],
    replies: Sequence[Reply],
    cached: Sequence[int | None],
) -> list[JobScore]:
    """Put the replies together, job by job; `cached` is None for requests that did not run."""
    valid = [number for number in range(len(jobs)) if number not in invalid]
    position = {number: i for i, number in enumerate(valid)}
    runs, reply_to = [], {}
    for request, reply, found in zip(requests, replies, cached, strict=True):
        reply_to.update(dict.fromkeys(request.uses, reply))
        if found is not None:
            first = request.uses[0]
            runs.append(Run(position[first.job], first.prefix, first.answer, found))
    usages = count_tokens([jobs[number] for number in valid], runs)
    scores = [JobScore("INVALID", invalid.get(number, "")) for number in range(len(jobs))]
    for number, usage in zip(valid, usages, strict=True):
        logprobs = _job_logprobs(jobs[number], number, reply_to)
        if isinstance(logprobs, str):
            scores[number] = JobScore("ERROR", logprobs, usage=usage)
        else:
            scores[number] = JobScore("OK", logprobs=logprobs, usage=usage)
    return scores


def _job_logprobs(
    job: ScoreJob, number: int, reply_to: Mapping[Use, Reply]
) -> tuple[tuple[tuple[float, ...], ...], ...] | str:
    prefixes = []
    for k in range(len(job.prefix_ends)):
        answers = []
        for a, answer in enumerate(job.answers):
            reply = reply_to[Use(number, k, a)]
            if isinstance(reply, str):
                return f"prefix {k}, answer {a}: {reply}"
            answers.append(reply[answer.scored_start : answer.scored_end])
        prefixes.append(tuple(answers))
    return tuple(prefixes)
