"""Learned biases of relative positions, whose table's gradient is the same bits in every run, compiled or not.

Called by programs; imports PyTorch and the checks. A table's value for each distance is spread over (query, key) by copies and views, so
autograd's way back is sums in a fixed order: no index, no scatter, no atomic addition.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_bool
from ..errors import bad_type, bad_value

__all__ = ["RelativeBias"]

_ROW_MULTIPLE = 16  # elements between rows that every kernel reads without a copy


class RelativeBias(nn.Module):
    """A bias ``(1, H, M, N)`` from a table of learned values, of T5's buckets (the default) or of a two-dim window, as Swin's.

    T5: ``bias[0, h, i, j] = weight[bucket(j − i − first_query), h]``, where near distances have a bucket each and far ones share some.
    Window: ``bias[0, h, i, j] = weight[(y_i − y_j + Wh − 1) · (2 Ww − 1) + x_i − x_j + Ww − 1, h]``, positions row by row.

    Args:
        heads: H.
        buckets: rows of the table. max_distance: the last bucket has all distances from about there on. bidirectional: half of the
            buckets for keys behind the query, half for those before it; False gives all keys behind it the bucket of distance 0.
            Defaults as T5's: 32, 128, True.
        window: ``(Wh, Ww)``: a window instead, and a table of ``(2 Wh − 1) · (2 Ww − 1)`` rows.
        device, dtype: of the table.

    ``weight`` is ``(rows, H)``: T5's ``relative_attention_bias.weight`` and Swin's ``relative_position_bias_table`` can be copied into it.
    Initial values: normal with σ = 0.02, cut off at 2σ.

    >>> bias = RelativeBias(heads=8)
    >>> attention(q, k, v, bias=bias(1024, 1024), scale=1.0)

    Sources: T5 (Raffel et al. 2020), Swin Transformer (Liu et al. 2021).
    """

    def __init__(
        self,
        heads: int,
        *,
        buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        window: tuple[int, int] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_count("heads", heads, 1)
        self.window = None if window is None else _checked_window(window)
        if self.window is None:
            check_bool("bidirectional", bidirectional)
            side = buckets // 2 if bidirectional else buckets
            _check_count("buckets", buckets, 4 if bidirectional else 2)
            _check_count("max_distance", max_distance, side // 2 + 1)
            if bidirectional and buckets % 2:
                raise bad_value("buckets", "an even number, as half of them are for each side", buckets)
            self._segments = _segments(side, max_distance, bidirectional)
            rows = buckets
        else:
            rows = (2 * self.window[0] - 1) * (2 * self.window[1] - 1)
        self.weight = nn.Parameter(torch.empty(rows, heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02, a=-0.04, b=0.04)

    def extra_repr(self) -> str:
        rows, heads = self.weight.shape
        return f"heads={heads}, rows={rows}, window={self.window}"

    def forward(self, queries: int | None = None, keys: int | None = None, first_query: int = 0) -> Tensor:
        """The bias ``(1, H, M, N)`` in the table's dtype, rows padded in memory to where kernels read them as they lie.

        Args:
            queries: M. keys: N, default M. A window has ``Wh · Ww`` of both, the default there.
            first_query: the position of query 0 among the keys: N − M where the keys come from a cache.

        Half-precision tables are spread, and their gradients summed, in float32. Memory for a moment: H · M · (M + N) elements.

        Lengths may be symbolic: torch.compile makes a graph for lengths that 16 divides and one for others; a program of torch.export holds
        for the range that is asked for, and leaves rows unpadded.
        """
        wide = self.weight.float() if self.weight.dtype in (torch.float16, torch.bfloat16) else self.weight
        if self.window is None:
            if queries is None:
                raise bad_type("queries", "a number of queries", "None")
            bias = self._by_distance(wide, queries, queries if keys is None else keys, first_query)
        else:
            size = self.window[0] * self.window[1]
            for name, count in (("queries", queries), ("keys", keys)):
                if count is not None and count != size:
                    raise bad_value(name, f"{size}, of the window {self.window}", count)
            if first_query:
                raise bad_value("first_query", "0, as a window has no cache", first_query)
            bias = self._by_window(wide)
        bias = bias.to(self.weight.dtype)
        length = bias.shape[-1]
        if torch.compiler.is_exporting():  # the layout of padded rows depends on the length, and a program is for a range of lengths
            return bias.contiguous().unsqueeze(0)
        return nn.functional.pad(bias, (0, -length % _ROW_MULTIPLE)).narrow(-1, 0, length).unsqueeze(0)

    def _by_distance(self, table: Tensor, M: int, N: int, first: int) -> Tensor:
        _check_count("queries", M, 0)
        _check_count("keys", N, 0)
        _check_whole("first_query", first)
        if 0 in (M, N):
            return table.new_empty(table.shape[1], M, N)
        (_, low, first_row), *between, (high, _, last_row) = self._segments
        rows = table.unbind(0)
        assert low is not None and high is not None
        # All distances that any lengths could want, of which a piece is cut: branches on lengths would bind a graph to some of them.
        first = torch.sym_max(torch.sym_min(first, N - low), -M - high)  # as far as anything changes
        before, behind = M + torch.sym_max(first, 0), N + 1 + torch.sym_max(-first, 0)
        near = [rows[row].expand(1 + end - begin, -1) for begin, end, row in between if begin is not None and end is not None]
        # Of no length: a row without gradient is a plain zero to autograd, which cannot be stacked with gradients that are DTensors.
        unused = [rows[row].expand(0, -1) for row in range(len(rows)) if row not in {row for _, _, row in self._segments}]
        values = torch.cat((rows[first_row].expand(before, -1), *near, rows[last_row].expand(behind, -1), *unused))
        # It begins with distance low + 1 − before, of key minus query; 1 − M − first is the first that is wanted.
        return _spread(values.narrow(0, torch.sym_max(-first, 0) - low, M + N).T, M, N)

    def _by_window(self, table: Tensor) -> Tensor:
        assert self.window is not None
        Wh, Ww = self.window
        # Swin counts query minus key, _spread key minus query: from the other end.
        grid = table.T.reshape(-1, 2 * Wh - 1, 2 * Ww - 1).flip(1, 2)
        by_x = _spread(grid, Ww, Ww).movedim(1, -1)  # (H, x of query, x of key, 2 Wh − 1)
        by_both = _spread(by_x, Wh, Wh)  # (H, x of query, x of key, y of query, y of key)
        return by_both.permute(0, 3, 1, 4, 2).reshape(-1, Wh * Ww, Wh * Ww)


def _spread(values: Tensor, M: int, N: int) -> Tensor:
    """``(…, M + N − 1)``, or longer, to ``(…, M, N)``: entry (i, j) is the value of distance j − i, those from 1 − M to N − 1 in order.

    M copies of the values in a row, read in rows that are one shorter: each begins one value earlier in its copy than the row before.
    """
    if M == 1:
        return values.narrow(-1, 0, N).unsqueeze(-2)
    length = values.shape[-1]
    copies = values.unsqueeze(-2).expand(*values.shape[:-1], M, length).reshape(*values.shape[:-1], M * length)
    return copies.narrow(-1, M - 1, M * (length - 1)).unflatten(-1, (M, length - 1)).narrow(-1, 0, N)


def _segments(side: int, max_distance: int, bidirectional: bool) -> list[tuple[int | None, int | None, int]]:
    """(lowest, highest, row) of key minus query, ascending and without gaps; None: no end. side: buckets of one direction."""
    exact = side // 2
    far = torch.arange(exact, max_distance + 1, device="cpu")  # also where a module is made under torch.device("meta")
    # In float32, as code for T5 has it: where this is a whole number rounding decides (10 buckets a side up to 160).
    scaled = torch.log(far.float() / exact) / math.log(max_distance / exact) * (side - exact)
    shared = (exact + scaled.to(torch.int64)).clamp(max=side - 1)
    shared[-1] = side - 1
    buckets = [*range(exact), *shared.tolist()]
    behind: list[tuple[int, int | None, int]] = []  # distances of one direction: from, to, bucket
    for distance, bucket in enumerate(buckets):
        if behind and behind[-1][2] == bucket:
            behind[-1] = (behind[-1][0], distance, bucket)
        else:
            behind.append((distance, distance, bucket))
    behind[-1] = (behind[-1][0], None, behind[-1][2])
    before = [(None if high is None else -high, -low, row) for low, high, row in reversed(behind[1:])]
    if not bidirectional:
        return [*before, (0, None, 0)]
    return [*before, (0, 0, 0), *((low, high, side + row) for low, high, row in behind[1:])]


def _checked_window(window: Any) -> tuple[int, int]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise bad_type("window", "a pair (height, width) or None", repr(window))
    for size in window:
        _check_count("window", size, 1)
    return window[0], window[1]


def _check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise bad_type(name, "a whole number", repr(value))


def _check_count(name: str, value: Any, least: int) -> None:
    _check_whole(name, value)
    if value < least:
        raise bad_value(name, f"{least} or more", value)
