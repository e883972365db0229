"""A vLLM logits processor that makes a request emit the answer it is to be scored on.

vLLM takes the log-probs that it returns before any processor runs, so they are those of the
model; the processor decides only which token comes out, and thus whose log-prob is reported.
"""

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FORCED_IDS = "turnwise_forced_ids"  # key in SamplingParams.extra_args


class ForcedTokens(AdapterLogitsProcessor):  # type: ignore[misc]  # vllm is Any to mypy
    """Step j of a request with forced ids emits ids[j]; other requests sample freely."""

    def is_argmax_invariant(self) -> bool:
        return False  # it also has to run for greedy requests

    def new_req_logits_processor(self, params: SamplingParams) -> "_Forced | None":
        forced_ids = (params.extra_args or {}).get(FORCED_IDS)
        return _Forced(forced_ids) if forced_ids else None


class _Forced:
    def __init__(self, forced_ids: list[int]) -> None:
        self.forced_ids = forced_ids

    def __call__(self, output_ids: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        if len(output_ids) < len(self.forced_ids):
            logits_V.fill_(float("-inf"))
            logits_V[self.forced_ids[len(output_ids)]] = 0.0
        return logits_V
