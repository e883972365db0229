"""Draw one token per row from its logits; log-probs are always those of the raw distribution."""

import random
from collections.abc import Sequence

import torch

from services.reward_server.engines import SampleParams
from services.reward_server.engines.model import HEAD_ROWS, DecoderModel


def choose_tokens(
    model: DecoderModel,
    hidden_RD: torch.Tensor,
    rows: Sequence[tuple[SampleParams, random.Random]],
) -> tuple[list[int], list[float]]:
    """Return a token and its log-prob for every hidden state."""
    tokens: list[int] = []
    logprobs: list[float] = []
    for first in range(0, len(rows), HEAD_ROWS):
        part = rows[first : first + HEAD_ROWS]
        logits_RV = model.logits(hidden_RD[first : first + HEAD_ROWS])
        picked_R = draw(logits_RV, part)
        chosen_R = logits_RV.gather(1, picked_R[:, None])[:, 0] - logits_RV.logsumexp(-1)
        tokens += picked_R.tolist()
        logprobs += chosen_R.tolist()
    return tokens, logprobs


def draw(
    logits_RV: torch.Tensor, rows: Sequence[tuple[SampleParams, random.Random]]
) -> torch.Tensor:
    """Invert each row's cumulative distribution at one uniform number of its own stream.

    A row's tokens so depend on its seed alone, not on who else is in the batch.
    """
    temperature_R1 = logits_RV.new_tensor([params.temperature or 1.0 for params, _ in rows])[
        :, None
    ]
    probs_RV = (logits_RV / temperature_R1).softmax(-1)
    for row, (params, _) in enumerate(rows):
        if params.top_k or params.top_p < 1.0:
            probs_RV[row] = keep_likely(probs_RV[row], params)
    uniform_R1 = logits_RV.new_tensor([stream.random() for _, stream in rows], dtype=torch.float64)
    cumulative_RV = probs_RV.cumsum(-1, dtype=torch.float64)
    point_R1 = uniform_R1[:, None] * cumulative_RV[:, -1:]
    drawn_R = torch.searchsorted(cumulative_RV, point_R1, right=True)[:, 0]
    greedy_R = torch.tensor([params.temperature == 0 for params, _ in rows], device=drawn_R.device)
    best_R = probs_RV.argmax(-1)
    # Rounding may point one past the end, and NaN logits anywhere: the log-prob then tells.
    return torch.where(greedy_R | (drawn_R >= probs_RV.shape[1]), best_R, drawn_R)


def keep_likely(probs_V: torch.Tensor, params: SampleParams) -> torch.Tensor:
    """Zero all but the top_k tokens, and of those all but the smallest set holding top_p."""
    ordered_V, index_V = probs_V.sort(descending=True)
    if params.top_k:
        ordered_V[params.top_k :] = 0
    before_V = ordered_V.cumsum(-1) - ordered_V
    ordered_V[before_V >= params.top_p * ordered_V.sum()] = 0
    return torch.zeros_like(probs_V).scatter_(0, index_V, ordered_V)
