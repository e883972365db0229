"""Three ways to attend along the trie; they agree, and differ in what they are fast on.

`merged` (CPU): one kernel call per stretch of the trie, results merged by log-sum-exp.
`flex` (CUDA): one FlexAttention call per layer with a block mask.
`dense`: one masked SDPA call per layer, the reference that tests compare the others with.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from services.reward_server.engines.model import Attend
from services.reward_server.engines.trie import Run

if TYPE_CHECKING:
    from services.reward_server.engines.packing import Packed

Attention = Callable[["Packed"], Attend]

# Returns (output, log-sum-exp); private to torch, so `dense` is tested against it.
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def store(packed: "Packed", layer: int, k_NKW: torch.Tensor, v_NKW: torch.Tensor) -> None:
    """Put the new keys and values of the pieces that are kept into their runs' buffers."""
    for piece in packed.pieces:
        if piece.keep:
            assert piece.run.kv is not None
            held = piece.run.kv[layer, :, :, piece.start : piece.stop]
            held[0] = k_NKW[piece.at : piece.end].transpose(0, 1)
            held[1] = v_NKW[piece.at : piece.end].transpose(0, 1)


def keys_values(run: Run, layer: int, length: int) -> torch.Tensor:
    """The first `length` keys and values of a run: [2, 1, K, length, W]."""
    assert run.kv is not None
    return run.kv[layer, :, None, :, :length]


def merged(packed: "Packed") -> Attend:
    """Own tokens first, then every stretch above them, merged by log-sum-exp."""

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        store(packed, layer, k, v)
        out_NHW = torch.empty_like(q, dtype=torch.float32)  # merged in fp32, rounded once
        lse_NH = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        for at_BL in packed.leaves:
            q_BHLW, k_BKLW, v_BKLW = (x[at_BL].transpose(1, 2) for x in (q, k, v))
            out, lse = flash(q_BHLW, k_BKLW, v_BKLW, 0.0, True)
            out_NHW[at_BL], lse_NH[at_BL] = out.transpose(1, 2).float(), lse.transpose(1, 2)
        q_1HNW, k_1KNW, v_1KNW = (x.transpose(0, 1)[None] for x in (q, k, v))
        out_1HNW, lse_1HN = out_NHW.transpose(0, 1)[None], lse_NH.T[None]
        for piece in packed.pieces:
            if piece.keep:
                own = slice(piece.at, piece.end)
                out_1HNW[:, :, own], lse_1HN[:, :, own] = flash(
                    q_1HNW[:, :, own], k_1KNW[:, :, own], v_1KNW[:, :, own], 0.0, True
                )
        for span in packed.spans:
            rows = slice(span.start, span.stop)
            keys, values = keys_values(span.run, layer, span.length)
            out, lse = flash(q_1HNW[:, :, rows], keys, values, 0.0, False)
            merge(out_1HNW[:, :, rows], lse_1HN[:, :, rows], out, lse)
        return out_NHW.reshape(len(q), -1).to(q.dtype)

    return attend


def merge(
    out: torch.Tensor, lse: torch.Tensor, more_out: torch.Tensor, more_lse: torch.Tensor
) -> None:
    """Fold attention over more keys into `out` and `lse`, in place."""
    out.lerp_(more_out.to(out.dtype), torch.sigmoid(more_lse - lse)[..., None])
    torch.logaddexp(lse, more_lse, out=lse)


class KeyTable(NamedTuple):
    """All keys of a pass side by side, and how many of each run a query sees."""

    runs: list[tuple[Run, int]]  # held runs and how many of their tokens are needed
    key_run_M: torch.Tensor
    key_place_M: torch.Tensor  # index within the run
    limit_PR: torch.Tensor  # tokens of run r that piece p sees; its own run counts from -1
    piece_N: torch.Tensor
    place_N: torch.Tensor  # index within the own run

    def visible(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether query token attends to key token, elementwise over index tensors."""
        limit = self.limit_PR[self.piece_N[query], self.key_run_M[key]]
        limit = torch.where(limit < 0, self.place_N[query] + 1, limit)
        return self.key_place_M[key] < limit


def key_table(packed: "Packed") -> KeyTable:
    """Number the runs of a pass: those held first, then the leaves in packed order."""
    needed: dict[int, tuple[Run, int]] = {}
    held = [(piece.run, piece.stop) for piece in packed.pieces if piece.keep]
    for run, length in [*held, *((span.run, span.length) for span in packed.spans)]:
        needed[id(run)] = (run, max(length, needed.get(id(run), (run, 0))[1]))
    column = {key: index for index, key in enumerate(needed)}
    leaves = [piece for piece in packed.pieces if not piece.keep]
    column |= {id(piece.run): len(needed) + i for i, piece in enumerate(leaves)}
    limit = torch.zeros((len(packed.pieces), len(column)), dtype=torch.long)
    for row, piece in enumerate(packed.pieces):
        for run in piece.run.path():
            if run.parent is not None and run.attach:
                limit[row, column[id(run.parent)]] = run.attach
        limit[row, column[id(piece.run)]] = -1
    lengths = [length for _, length in needed.values()] + [piece.stop for piece in leaves]
    device = packed.ids.device
    sizes = torch.tensor([piece.end - piece.at for piece in packed.pieces])
    places = [torch.arange(piece.start, piece.stop) for piece in packed.pieces]
    return KeyTable(
        list(needed.values()),
        torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device),
        torch.cat([torch.arange(length) for length in lengths]).to(device),
        limit.to(device),
        torch.arange(len(packed.pieces)).repeat_interleave(sizes).to(device),
        torch.cat(places).to(device),
    )


def gathered(
    packed: "Packed", table: KeyTable, layer: int, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values of a pass in the table's order: [1, K, M, W] each."""
    store(packed, layer, k, v)
    leaves = [slice(piece.at, piece.end) for piece in packed.pieces if not piece.keep]
    held = [keys_values(run, layer, length) for run, length in table.runs]
    keys, values = (
        torch.cat([kv[i] for kv in held] + [x[at].transpose(0, 1)[None] for at in leaves], dim=2)
        for i, x in enumerate((k, v))
    )
    return keys, values


def dense(packed: "Packed") -> Attend:
    """One SDPA call per layer with the full mask: simple, exact, quadratic in memory."""
    table = key_table(packed)
    queries = torch.arange(len(packed.ids), device=packed.ids.device)
    keys = torch.arange(len(table.key_run_M), device=packed.ids.device)
    mask_NM = table.visible(queries[:, None], keys[None])

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        all_k, all_v = gathered(packed, table, layer, k, v)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], all_k, all_v, attn_mask=mask_NM, enable_gqa=True
        )
        return out[0].transpose(0, 1).reshape(len(q), -1)

    return attend


def flex(packed: "Packed") -> Attend:
    """One FlexAttention call per layer; blocks nobody sees are skipped."""
    table = key_table(packed)
    device = packed.ids.device

    def visible(
        _batch: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return table.visible(query, key)

    mask = create_block_mask(
        visible, None, None, len(packed.ids), len(table.key_run_M), device=str(device)
    )
    kernel: Callable[..., torch.Tensor] = (
        compiled_flex() if device.type == "cuda" else flex_attention  # type: ignore[assignment]
    )

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        all_k, all_v = gathered(packed, table, layer, k, v)
        out = kernel(q.transpose(0, 1)[None], all_k, all_v, block_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1).reshape(len(q), -1)

    return attend


_compiled: list[Callable[..., torch.Tensor]] = []


def compiled_flex() -> Callable[..., torch.Tensor]:
    """Compile FlexAttention once per process."""
    if not _compiled:
        _compiled.append(torch.compile(flex_attention, dynamic=True))
    return _compiled[0]


BACKENDS: dict[str, Attention] = {"merged": merged, "flex": flex, "dense": dense}
