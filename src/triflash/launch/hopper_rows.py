"""Arguments of the Hopper kernels ``dq`` and ``dbias``. Touches no device: tensors may be meta tensors. All must be addressable by TMA
(``launch/hopper.addressable``), and what they write ``writable``, except by the kernel ``dbias``: that may have any strides and is written
faster if it is.

``stats`` is what both read of a query: a contiguous float32 tensor (B * H, 2 or 3, M up to a multiple of 128) of lse in base 2 (+inf where
the query sees no key or does not exist), delta, and if the spec keeps it rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.hopper import dbias as dbias_kernels
from ..kernels.hopper import dq as dq_kernels
from ..plan.configs import padded
from ..plan.hopper import ROWS, bias_block, schedule, whole_tiles
from ..plan.hopper_rows import RowsConfig, batch_fastest, dbias_places, dbias_rounds, dbias_shuffle, dbias_tiles, slots_needed
from ..spec import AttentionSpec
from .calls import Call, alibi_of, bias_strides, cap_of, dropout_of, lengths_of, slope_strides
from .hopper import descriptor, mask_tiles, register_limit, writable

__all__ = ["STATISTICS_MULTIPLE", "dbias_call", "dq_call"]

STATISTICS_MULTIPLE = 128  # queries


def dq_call(
    spec: AttentionSpec, config: RowsConfig, programs: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dout: Tensor,
    stats: Tensor, dq: Tensor, dbias: Tensor | None = None, lengths: Tensor | None = None, slopes: Tensor | None = None,
    mask: Tensor | None = None, seed: Tensor | None = None, mild: Tensor | None = None,
) -> Call:  # fmt: skip
    """dq (B, M, H, D) like q, and if given dbias, of a bias of full shape and in its dtype. k and v may have fewer heads than q."""
    assert config.num_stages > config.ahead, "the last product lags behind the block that would take its only key buffer: a deadlock"
    head, value, block_n = padded(spec.head_dim), padded(spec.value_dim), config.block_n
    tiled = spec.bias is not None and spec.bias.varies[4]
    bias_desc = dbias_desc = None
    bias_on: tuple[int, ...] | None = None
    bias = bias.view(torch.uint8) if bias is not None and bias.dtype == torch.bool else bias
    if bias is not None and tiled:
        bias_desc = descriptor(bias, (1, 1, 1, *bias_block(spec, config)))
        bias_on = tuple(int(size > 1) for size in bias.shape[:3])
    if dbias is not None:
        assert spec.bias is not None and all(spec.bias.varies) and not spec.bias.is_mask
        dbias_desc = descriptor(dbias, (1, 1, 1, ROWS, block_n))
    pointer = None if tiled else bias
    tiles_m, tiles = whole_tiles(spec, config)
    args = (
        descriptor(q, (1, ROWS, 1, head)),
        descriptor(dout, (1, ROWS, 1, value)),
        descriptor(k, (1, block_n, 1, head)),
        descriptor(v, (1, block_n, 1, value)),
        descriptor(dq, (1, ROWS, 1, head)),
        *(bias_desc, dbias_desc, pointer, lengths_of(lengths), slopes, stats, mild),
        *(
            None if pointer is None else bias_strides(pointer)[:4],  # type: ignore[index]
            slope_strides(slopes),
            bias_on,
            cap_of(spec),
            dropout_of(spec, seed),
            *mask_tiles(spec, mask, config),
        ),
        *(spec.batch, spec.heads, q.shape[2] // k.shape[2], spec.batch_inner, spec.queries, spec.keys, spec.lo, spec.hi, spec.scale),
        *(tiles_m, tiles, *schedule(spec, config, programs)),
    )
    constants: dict[str, Any] = {
        "C": config,
        "BATCH_FASTEST": batch_fastest(spec),
        "IS_MASK": spec.bias is not None and spec.bias.is_mask,
        "VARIES_M": spec.bias is not None and spec.bias.varies[3],
        "HAS_REST": stats.shape[1] == 3,
        "EVEN_N": spec.keys % block_n == 0 and lengths is None,
        "ALIBI": alibi_of(spec),
    }
    return Call(dq_kernels.dq, args, constants | register_limit(config), config, programs)


def dbias_call(
    spec: AttentionSpec, config: RowsConfig, programs: int, splits: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dout: Tensor,
    stats: Tensor, parts: Tensor, lengths: Tensor | None = None, slopes: Tensor | None = None,
    mask: Tensor | None = None, seed: Tensor | None = None, mild: Tensor | None = None,
) -> Call:  # fmt: skip
    """dbias of a bias for which ``plan.hopper_rows.dbias_works``, as ``splits`` parts: parts is (splits, the bias's own five dims).

    One part may have the bias's dtype and be the gradient itself; several are float32, and ``dbias_sum`` adds them. Of a tile that is seen
    every part must have a round, for only those of unseen tiles are filled with zeros.
    """
    assert splits <= dbias_rounds(spec), "a part without rounds would not be written"
    block_n, chunk = config.block_n, config.chunk
    slots = min(config.num_stages, config.value_stages)
    assert spec.bias is not None and slots >= slots_needed(spec, chunk), "fewer slots than a round needs: a deadlock"
    rows, keys = (1, ROWS, 1, chunk), (1, block_n, 1, chunk)
    tiles_m, tiles_n, own = dbias_tiles(spec, config)
    fold, full = dbias_places(spec, config)
    direct = splits == 1 and parts.dtype == bias.dtype and writable(parts[0])
    strides = None if direct else tuple(0 if size == 1 else stride for size, stride in zip(parts.shape, parts.stride(), strict=True))
    args = (
        *(descriptor(q, rows), descriptor(dout, rows), descriptor(k, keys), descriptor(v, keys)),
        descriptor(bias, (1, 1, 1, ROWS, block_n)),
        *(
            descriptor(parts[0], (1, 1, 1, ROWS, block_n)) if direct else None,
            None if direct else parts,
            lengths_of(lengths),
            slopes,
            stats,
            mild,
            strides,
            slope_strides(slopes),
            cap_of(spec),
            dropout_of(spec, seed),
            None if mask is None else mask.view(torch.uint8),
            bias_strides(mask),
        ),
        *(spec.batch_outer, spec.batch_inner, spec.heads, q.shape[2] // k.shape[2], spec.queries, spec.keys, spec.lo, spec.hi),
        *(spec.scale, splits, tiles_m, tiles_n, own // (tiles_m * tiles_n) * len(full) * splits, len(full), fold),
        dbias_shuffle(spec, config, splits, programs),
    )
    constants: dict[str, Any] = {
        "C": config,
        "D": spec.head_dim,
        "DV": spec.value_dim,
        "VARIES_B0": spec.bias.varies[0],
        "VARIES_B1": spec.bias.varies[1],
        "VARIES_H": spec.bias.varies[2],
        "HAS_REST": stats.shape[1] == 3,
        "EVEN": spec.queries % config.block_m == 0 and spec.keys % block_n == 0,
        "ALIBI": alibi_of(spec),
    }
    return Call(dbias_kernels.dbias, args, constants | register_limit(config), config, programs)
