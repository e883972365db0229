"""Start vLLM: its environment, its arguments, and the route that this machine can run."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.v1.engine.async_llm import AsyncLLM

from services.reward_server.engines import Route

# Read by vLLM and its worker processes; whatever is already set in the environment wins.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # nothing calls home
    "VLLM_LOGGING_LEVEL": "WARNING",
}
CPU_ENVIRONMENT = {
    # Do not pin threads to cores, which other processes need as well, and leave one core to the
    # scheduler: with a thread more than cores, they would wait for each other spinning.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) - 1)),
}
# What vLLM would choose for itself on a CPU: 128 tokens, and nearly all memory.
CPU_ARGS = {"block_size": 32, "kv_cache_memory_bytes": 1 << 30}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


class CacheGauge:
    """Notes what vLLM says about its cache after every step (a vLLM stat logger)."""

    used_share = 0.0  # by running requests; vLLM counts blocks kept for reuse as free

    def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
        if scheduler_stats is not None:
            self.used_share = scheduler_stats.kv_cache_usage

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

    log = log_engine_initialized


class Started(NamedTuple):
    llm: Any  # AsyncLLM
    route: Route
    cache: CacheGauge
    has_tokenizer: bool


async def start_llm(model: Path, route: Route | None, **engine_args: Any) -> Started:
    """Start AsyncLLM over the best route, or over `route`; ValueError if that cannot run."""
    _default_environment(ENVIRONMENT)
    if route == "forced_decode":
        # Only the V1 model runner takes the logits processor that forces tokens.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    has_tokenizer = any((model / name).is_file() for name in TOKENIZER_FILES)
    return await asyncio.to_thread(_start, model, route, has_tokenizer, engine_args)


def _default_environment(values: dict[str, str]) -> None:
    for name, value in values.items():
        os.environ.setdefault(name, value)


def _start(
    model: Path, asked: Route | None, has_tokenizer: bool, engine_args: dict[str, Any]
) -> Started:
    on_cpu = current_platform.is_cpu()
    if on_cpu:
        _default_environment(CPU_ENVIRONMENT)
        chosen = {name: value for name, value in engine_args.items() if value is not None}
        engine_args = CPU_ARGS | chosen
    args = AsyncEngineArgs(
        model=str(model),
        skip_tokenizer_init=not has_tokenizer,
        load_format="safetensors",
        generation_config="vllm",  # the caller says how to sample, not a file beside the model
        logprobs_mode="raw_logprobs",
        enable_prefix_caching=True,
        enforce_eager=on_cpu,  # compiling for the CPU costs a minute and gains little
        worker_extension_cls="services.reward_server.engines.vllm_worker.WeightLoader",
        **engine_args,
    )
    route = choose_route(asked, _runs_v2(args))
    if route == "forced_decode":
        processor = "services.reward_server.engines.vllm_forced:ForcedTokens"
        args = replace(args, logits_processors=[processor])
    elif route == "trace_replay":
        args = replace(args, enable_trace_replay=True)
    cache = CacheGauge()
    llm = AsyncLLM.from_engine_args(args, stat_loggers=[lambda *_: cache])
    return Started(llm, route, cache, has_tokenizer)


def _runs_v2(args: AsyncEngineArgs) -> bool:
    """Whether vLLM would run this model with its V2 model runner, whose kernels are Triton's."""
    return bool(HAS_TRITON and args.create_engine_config().use_v2_model_runner)


def choose_route(asked: Route | None, runs_v2: bool) -> Route:
    """Return the route asked for, or the best; ValueError if vLLM cannot run it here."""
    best: Route = "trace_replay" if runs_v2 else "forced_decode"
    route = asked or best
    if route not in (best, "prompt_logprobs"):
        runner = "V2" if runs_v2 else "V1"
        raise ValueError(
            f"route {route} is not available: vLLM runs this model here with its {runner} model "
            f"runner, which offers {best} and prompt_logprobs"
        )
    return route
