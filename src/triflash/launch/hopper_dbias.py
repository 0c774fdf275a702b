"""Arguments of the Hopper kernel ``dbias``; called by ``launch/hopper_backward.py``. Touches no device: tensors may be meta tensors.

All but the gradient must be addressable by TMA (``launch/hopper.addressable``); that may have any strides and is written faster if it is
``writable``. ``stats``: as of ``launch/hopper_dq.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.hopper import dbias as dbias_kernels
from ..plan.kernels.dbias import DbiasConfig, bias_tiles, of_packed, places, shuffle, slots_needed
from ..plan.kernels.shared import ROWS, SMALLEST_BLOCK, multiplied_columns, row_by_mma, second_buffer
from ..plan.steps import broadcast_rows
from ..spec import AttentionSpec
from .calls import Call, alibi_of, bias_strides, cap_of, dropout_of, lengths_of, slope_strides
from .hopper import blocks_of, descriptor, of_rows, register_limit, writable

__all__ = ["dbias_call"]


def dbias_call(
    spec: AttentionSpec, config: DbiasConfig, programs: int, splits: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dout: Tensor,
    stats: Tensor, parts: Tensor, lengths: Tensor | None = None, slopes: Tensor | None = None,
    mask: Tensor | None = None, seed: Tensor | None = None, small_lse: Tensor | None = None,
    second: Tensor | None = None, loops: str = "both", packed: tuple[Any, ...] | None = None,
) -> Call:  # fmt: skip
    """dbias of a bias that ``plan.kernels.dbias.why_not`` allows, as ``splits`` parts: parts is (splits, the bias's own five dims).

    One part may have the bias's dtype and be the gradient itself; several are float32, and ``dbias_sum`` adds them. Of a tile that is seen
    every part must have a round, for only those of unseen tiles are filled with zeros. spec may be one of packed sequences: dims of
    the bias are then sequences, 1, heads, and its own queries and keys, and ``packed`` is what ``hopper_packed.sequences_of`` returns.
    """
    given, spec = spec, spec if spec.packed is None else of_packed(spec)
    assert splits <= broadcast_rows(spec), "a part without rounds would not be written"
    block_n, chunk = config.block_n, config.chunk
    assert spec.bias is not None
    assert config.slots >= slots_needed(spec, chunk, config.in_turn), "fewer slots than a round needs: a deadlock"
    tiles_m, tiles_n, own = bias_tiles(spec, config)
    fold, full = places(spec, config)
    whole = splits == 1 and parts.dtype == bias.dtype and writable(parts[0])
    strides = None if whole else tuple(0 if size == 1 else stride for size, stride in zip(parts.shape, parts.stride(), strict=True))
    args = (
        *(of_rows(given, x, rows, chunk) for x, rows in ((q, ROWS), (dout, ROWS), (k, block_n), (v, block_n))),
        descriptor(bias, (1, 1, 1, ROWS, block_n)),
        *(
            descriptor(parts[0], (1, 1, 1, ROWS, block_n)) if whole else None,
            None if whole else parts,
            lengths_of(lengths),
            slopes,
            stats,
            small_lse,
            strides,
            slope_strides(slopes),
            cap_of(spec),
            dropout_of(spec, seed),
            *blocks_of(second, second_buffer(spec, config).shape),
            packed,
            None if mask is None else mask.view(torch.uint8),
            bias_strides(mask),
        ),
        *(spec.batch_outer, spec.batch_inner, spec.heads, q.shape[2] // k.shape[2], spec.queries, spec.keys, given.lo, given.hi),
        *(spec.scale, splits, tiles_m, tiles_n, own // (tiles_m * tiles_n) * len(full) * splits, len(full), fold),
        shuffle(spec, config, splits, programs),
    )
    constants: dict[str, Any] = {
        "C": config,
        "QK": multiplied_columns(spec.head_dim, -(-spec.head_dim // chunk) * chunk),
        "OV": multiplied_columns(spec.value_dim, -(-spec.value_dim // chunk) * chunk),
        "VARIES_B0": spec.bias.varies[0],
        "VARIES_B1": spec.bias.varies[1],
        "VARIES_H": spec.bias.varies[2],
        "HAS_REST": stats.shape[1] == 3,
        "EVEN": spec.queries % config.block_m == 0 and spec.keys % block_n == 0,
        "ALIBI": alibi_of(given, SMALLEST_BLOCK),
        "ROW_BY_MMA": row_by_mma(spec),
        "LOOPS": loops,
    }
    return Call(dbias_kernels.dbias, args, constants | register_limit(config), config, programs)
