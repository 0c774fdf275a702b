"""Arguments of the Hopper kernel ``dq``; called by ``launch/hopper_backward.py``. Touches no device: tensors may be meta tensors.

All must be addressable by TMA (``launch/hopper.addressable``), and dq and dbias ``writable``. ``stats``: as ``plan/kernels/shared.py`` says
of its size, lse in base 2 (+inf where the query sees no key or does not exist), delta, and if the spec keeps it rest.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernels.hopper import dq as dq_kernels
from ..plan.configs import padded
from ..plan.kernels.dq import DqConfig
from ..plan.kernels.shared import ROWS, SMALLEST_BLOCK, batch_fastest, mask_buffer, multiplied_columns, second_buffer, widths
from ..spec import AttentionSpec
from .calls import Call, alibi_of, cap_of, dropout_of, lengths_of, slope_strides
from .hopper import (
    batch_of,
    bias_by_queries,
    blocks_of,
    descriptor,
    is_even,
    of_rows,
    register_limit,
    schedule_of_queries,
)

__all__ = ["dq_call"]


def dq_call(
    spec: AttentionSpec, config: DqConfig, programs: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dout: Tensor,
    stats: Tensor, dq: Tensor, dbias: Tensor | None = None, lengths: Tensor | None = None, slopes: Tensor | None = None,
    mask: Tensor | None = None, seed: Tensor | None = None, small_lse: Tensor | None = None,
    second: Tensor | None = None, forward_keys: int = SMALLEST_BLOCK, packed: tuple[Any, ...] | None = None,
    loops: str = "both", bounds: tuple[Any, ...] | None = None,
    skips: bool = False,
) -> Call:  # fmt: skip
    """dq (B, M, H, D) like q, and if given dbias, of a bias of full shape and in its dtype. k and v may have fewer heads than q. bounds: of
    what a mask shows (``mask_bounds.bounds_of`` and ``skips``), not with dbias.
    """
    head, value, block_n = padded(spec.head_dim), padded(spec.value_dim), config.block_n
    bias_desc, bias_on, pointer, pointer_strides = bias_by_queries(spec, bias, config)
    dbias_desc = None
    if dbias is not None:
        assert spec.bias is not None and all(spec.bias.varies) and not spec.bias.is_mask
        dbias_desc = descriptor(dbias, (1, 1, 1, ROWS, block_n))
    heads, values = widths(spec.head_dim, config.own_widths), widths(spec.value_dim, config.own_widths)
    blocks = ((q, ROWS, heads), (dout, ROWS, values), (k, block_n, heads), (v, block_n, values), (dq, ROWS, heads))
    args = (
        *(of_rows(spec, x, rows, columns[0]) for x, rows, columns in blocks),
        *(bias_desc, dbias_desc, pointer, lengths_of(lengths), packed, bounds, slopes, stats, small_lse),
        *(
            pointer_strides,
            slope_strides(slopes),
            bias_on,
            cap_of(spec),
            dropout_of(spec, seed),
            *blocks_of(second, second_buffer(spec, config).shape),
            *blocks_of(mask, mask_buffer(spec, config).shape),
            *(of_rows(spec, x, rows, columns[1]) if len(columns) > 1 else None for x, rows, columns in blocks),
        ),
        *(batch_of(spec), spec.heads, q.shape[2] // k.shape[2], spec.batch_inner, spec.queries, spec.keys, spec.lo, spec.hi, spec.scale),
        *schedule_of_queries(spec, config, programs),
    )
    constants: dict[str, Any] = {
        "C": config,
        "BATCH_FASTEST": batch_fastest(spec),
        "IS_MASK": spec.bias is not None and spec.bias.is_mask,
        "VARIES_M": spec.bias is not None and spec.bias.varies[3],
        "HAS_REST": stats.shape[1] == 3,
        "EVEN_N": is_even(spec, block_n),
        "ALIBI": alibi_of(spec, forward_keys),
        "LOOPS": loops,
        "QK": multiplied_columns(spec.head_dim, head),
        "OV": multiplied_columns(spec.value_dim, value),
        "SKIPS": skips,
    }
    return Call(dq_kernels.dq, args, constants | register_limit(config), config, programs)
