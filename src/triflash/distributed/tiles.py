"""Attention of some rows and some keys of a longer problem: called by every method on its own GPU.

It is the operators of ``ops.py`` that compute them.

A *tile* is a rectangle of one problem's scores, given to an operator with the band moved to where it lies. Where a row's keys come in one
tile its result is that operator's; where they come in several the results are merged in float32 (``merging.py``), and the backward pass of
every tile is given the merged output and lse.

ALiBi counts from the diagonal that ends in the last query and the last key of what an operator is given. A tile that does not end there
is cut where the diagonal crosses it; what lies on one side of it is a bias of keys, and a shift of its rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..lengths import FARTHEST, Places, comparable
from ..ops import attention_backward, attention_backward_, attention_backward_two, attention_forward
from ..spec import keeps_rest
from .chunks import Piece
from .merging import LOG2E, Merged, Result, in_base_2, split, wide

__all__ = [
    "Extras",
    "Problem",
    "Sums",
    "Tile",
    "backward",
    "forward",
    "keeps",
    "once",
    "placed",
    "sink_gradient",
    "sunk",
    "tiles_of",
]


class Extras(NamedTuple):
    """What there is beside q, k and v, as operators take it: with five dims, rows of this rank and all keys; the seed in the form that
    tells the place of a part (:func:`triflash.dropout.keep_mask`); starts, lengths and diagonals number the whole problem's. None: absent.
    """

    bias: Tensor | None = None
    second: Tensor | None = None
    sink: Tensor | None = None
    mask: Tensor | None = None
    key_lengths: Tensor | None = None
    slopes: Tensor | None = None
    seed: Tensor | None = None
    query_starts: Tensor | None = None
    query_lengths: Tensor | None = None
    key_starts: Tensor | None = None
    diagonal: Tensor | None = None

    @property
    def places(self) -> tuple[Tensor | None, ...]:
        """query_starts, query_lengths, key_starts and diagonal."""
        return self[7:]

    def heads(self, part: slice) -> Extras:
        """Those of some query heads."""
        bias, second, mask = (x if x is None or x.shape[2] == 1 else x[:, :, part] for x in (self.bias, self.second, self.mask))
        sink = None if self.sink is None else self.sink[part]
        slopes = None if self.slopes is None else self.slopes[:, part]
        seed = None if self.seed is None else _counted_from(self.seed, (0, 0, part.start))
        return self._replace(bias=bias, second=second, mask=mask, sink=sink, slopes=slopes, seed=seed)


@dataclass(frozen=True)
class Problem:
    """The whole problem, without tensors: its lengths, its band of visible ``lo <= j - i <= hi`` and its options, folded.

    by_rows: whether bias and second bias vary over queries, so that this rank's rows of their gradients are all of them. diagonal: the key
    at which ALiBi sees the first query. by_entry: whether each batch entry has a diagonal of its own, from which lo and hi count.
    """

    queries: int
    keys: int
    lo: int | None
    hi: int | None
    batch_inner: int
    scale: float
    softcap: float
    dropout_p: float
    precision: str
    backend: str
    deterministic: bool
    by_rows: tuple[bool, bool] = (False, False)
    diagonal: int = 0
    by_entry: bool = False


class Tile(NamedTuple):
    """rows: from where to where of what this rank holds. keys: of the buffer at hand. row, key: where these stand in the problem.

    lo, hi: the band, counted from them. alibi: "" there is none, "own" the operator's; "behind", "ahead": every key is on that side of the
    diagonal.
    """

    rows: slice
    keys: slice
    row: int
    key: int
    lo: int | None
    hi: int | None
    alibi: str = ""

    @property
    def height(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def width(self) -> int:
        return self.keys.stop - self.keys.start


def _moved(problem: Problem, row: int, key: int) -> tuple[int | None, int | None]:
    shift = 0 if problem.by_entry else row - key
    return (None if problem.lo is None else problem.lo + shift, None if problem.hi is None else problem.hi + shift)


def _seen(problem: Problem, q: Piece, k: Piece) -> str:
    """Of a rectangle: whether "all" of it lies in the band, "some" or "none"."""
    least, most = k.start - (q.stop - 1), k.stop - 1 - q.start
    lo, hi = problem.lo, problem.hi
    if problem.by_entry and (lo is not None or hi is not None):
        return "some"  # the device knows which
    if (lo is not None and most < lo) or (hi is not None and least > hi):
        return "none"
    return "all" if (lo is None or least >= lo) and (hi is None or most <= hi) else "some"


def tiles_of(problem: Problem, rows: Sequence[Piece], keys: Sequence[Piece], extras: Extras) -> list[Tile]:
    """The tiles of which something is visible, of a rank's rows and the keys at hand."""
    plain = extras.slopes is None and not problem.dropout_p and extras.query_starts is None and extras.query_lengths is None
    many = plain and extras.key_lengths is None and extras.key_starts is None and not problem.by_entry
    many = many and all(x is None or x.shape[4] == 1 for x in (extras.bias, extras.second, extras.mask))
    seen = {(q, k): _seen(problem, q, k) for q in rows for k in keys}
    left = {pair for pair, how in seen.items() if how != "none"}
    found: list[Tile] = []
    if not left:
        return found
    all_rows, all_keys = slice(rows[0].at, rows[-1].at + _size(rows[-1])), slice(keys[0].at, keys[-1].at + _size(keys[-1]))
    if many and len(left) > 1 and problem.lo is None and problem.hi == 0 and tuple(rows) == tuple(keys):
        return [Tile(all_rows, all_keys, rows[0].start, keys[0].start, None, 0)]  # the same rows and keys, in the same order
    if plain and len(rows) > 1:  # several pieces of rows that see all of a piece of keys, or of all of them
        wide = many and len(keys) > 1 and all(how == "all" for how in seen.values())
        for k in () if wide else keys:
            if all(seen[q, k] == "all" for q in rows):
                found.append(Tile(all_rows, slice(k.at, k.at + _size(k)), rows[0].start, k.start, None, None))
                left -= {(q, k) for q in rows}
        if wide:
            return [Tile(all_rows, all_keys, rows[0].start, keys[0].start, None, None)]
    for q in rows:
        if many and len(keys) > 1 and all(seen[q, k] == "all" and (q, k) in left for k in keys):
            found.append(Tile(slice(q.at, q.at + _size(q)), all_keys, q.start, keys[0].start, None, None))
            continue
        for k in keys:
            if (q, k) in left:
                found += _tiles(problem, q, k, extras.slopes is not None)
    return found


def _size(piece: Piece) -> int:
    return piece.stop - piece.start


def _tiles(problem: Problem, q: Piece, k: Piece, alibi: bool) -> list[Tile]:
    """The tiles of one rectangle: one, or where ALiBi wants it up to three."""
    a, b, k0, k1 = q.start, q.stop, k.start, k.stop
    if problem.hi is not None and not problem.by_entry:
        k1 = min(k1, b + problem.hi)

    def tile(r0: int, r1: int, c0: int, c1: int, side: str) -> Tile:
        rows, keys = slice(q.at + r0 - a, q.at + r1 - a), slice(k.at + c0 - k0, k.at + c1 - k0)
        return Tile(rows, keys, r0, c0, *_moved(problem, r0, c0), side)

    if not alibi or problem.by_entry:
        return [tile(a, b, k0, k1, "own" if alibi else "")]
    shift, found = problem.diagonal, []
    cut = min(max(k1 - shift, a), b)  # rows from here on have the diagonal behind the last key
    if cut > a:
        end = max(k0, cut + shift)
        if end > k0:
            found.append(tile(a, cut, k0, end, "own"))
        if k1 > end:
            found.append(tile(a, cut, end, k1, "ahead"))
    if b > cut:
        found.append(tile(cut, b, k0, k1, "behind"))
    return [
        each
        for each in found
        if _seen(problem, Piece(each.row, each.row + each.height, 0), Piece(each.key, each.key + each.width, 0)) != "none"
    ]


def once(tiles: Sequence[Tile]) -> bool:
    """Whether no row has its keys in two tiles, and operators' results need no shift."""
    ends = sorted((tile.rows.start, tile.rows.stop) for tile in tiles)
    apart = all(before[1] <= after[0] for before, after in itertools.pairwise(ends))
    return apart and not any(tile.alibi in ("behind", "ahead") for tile in tiles)


def keeps(problem: Problem, extras: Extras) -> bool:
    """Whether operators keep what a float32 lse loses."""
    return keeps_rest(None if extras.bias is None else extras.bias.dtype, extras.slopes is not None, problem.softcap)


def sunk(merged: Merged, x: Extras, rows: Sequence[Piece]) -> None:
    """Let the sink take its part of a rank's rows, if there is one; of those that are rows."""
    if x.sink is not None:
        merged.sunk(x.sink, _absent(x, rows))


def _absent(x: Extras, rows: Sequence[Piece]) -> Tensor | None:
    """Which of a rank's rows are none, ``(B, rows)``, by query_starts and query_lengths. None: all are rows."""
    given = x.query_lengths if x.query_starts is None else x.query_starts
    if given is None or not rows:
        return None
    at = torch.cat([torch.arange(p.start, p.stop, device=given.device) for p in rows])
    present = Places(x.query_starts, x.query_lengths).rows(at)
    return None if present is None else ~present


class _Inputs(NamedTuple):
    """What an operator gets of a tile. shift: what its scores are to be lowered by, in base 2, ``(B|1, H, rows)`` float64; None: 0."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    second: Tensor | None
    mask: Tensor | None
    key_lengths: Tensor | None
    slopes: Tensor | None
    shift: Tensor | None
    numbers: tuple[object, ...]
    places: tuple[object, ...]  # query_starts to the operators' shift; () where all are None


def _inputs(problem: Problem, tile: Tile, q: Tensor, k: Tensor, v: Tensor, x: Extras, exclusive: bool) -> _Inputs:
    bias, second, mask = (None if y is None else part_of(y, tile) for y in (x.bias, x.second, x.mask))
    if not exclusive:  # gradients are summed over tiles: in float32
        bias, second = (y if y is None or y.dtype in (torch.bool, torch.float64) else y.float() for y in (bias, second))
    lengths = _from(x.key_lengths, tile.key)
    places: tuple[object, ...] = ()
    if any(y is not None for y in x.places):
        diagonal = None if x.diagonal is None else comparable(x.diagonal).clamp(-FARTHEST, FARTHEST) + (tile.row - tile.key)
        places = (_from(x.query_starts, tile.row), _from(x.query_lengths, tile.row), _from(x.key_starts, tile.key), diagonal, None)
    slopes, shift = (x.slopes if tile.alibi == "own" else None), None
    if tile.alibi in ("behind", "ahead") and second is not None:  # a third bias there is not: the operator counts from another diagonal
        slopes, places = x.slopes, (*(places or (None,) * 5)[:4], problem.diagonal + tile.row - tile.key)
    elif tile.alibi in ("behind", "ahead"):
        assert x.slopes is not None
        line, shift = _line(problem, tile, q, x.slopes)
        if bias is None:
            bias = line
        elif bias.dtype == torch.bool:
            bias, mask = line, bias
        else:
            second = line
    numbers = (problem.batch_inner, tile.lo, tile.hi, problem.scale, problem.precision, problem.backend)
    return _Inputs(
        _rows_of(q, tile.rows), _rows_of(k, tile.keys), _rows_of(v, tile.keys), bias, second, mask, lengths, slopes, shift, numbers, places
    )


def _rows_of(x: Tensor, part: slice) -> Tensor:
    """Some rows of ``(B, rows, H, ·)``."""
    return x if part.stop - part.start == x.shape[1] else x[:, part]


def _from(numbers: Tensor | None, begin: int) -> Tensor | None:
    """Starts or lengths, counted from further on."""
    return numbers if numbers is None or not begin else (comparable(numbers) - begin).clamp(min=0)


def part_of(x: Tensor, tile: Tile) -> Tensor:
    """The part of a bias or mask of five dims that a tile needs: this rank's rows, and keys by where they stand."""
    if x.shape[3] not in (1, tile.height):
        x = x[:, :, :, tile.rows]
    return x if x.shape[4] in (1, tile.width) else x[..., tile.key : tile.key + tile.width]


def _line(problem: Problem, tile: Tile, q: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """ALiBi on one side of the diagonal: a bias of keys, 0 at the nearest, and what rows are lowered by beside it."""
    slopes = slopes.to(torch.float64)
    i = torch.arange(tile.row, tile.row + tile.height, device=q.device) + problem.diagonal
    j = torch.arange(tile.key, tile.key + tile.width, device=q.device)
    near = tile.key + tile.width - 1 if tile.alibi == "behind" else tile.key
    shift = slopes[..., None] * (i - near).abs().double() * LOG2E  # (B|1, H, rows)
    line = -slopes[..., None] * (j - near).abs().double()  # (B|1, H, keys)
    line = line.to(wide(q.dtype))
    five = line[None] if line.shape[0] == 1 else line.unflatten(0, (-1, problem.batch_inner))
    return five[:, :, :, None], shift


def forward(
    problem: Problem, tiles: Sequence[Tile], rows: Sequence[Piece], q: Tensor, k: Tensor, v: Tensor, x: Extras,
    merged: Merged | None = None,
) -> Result | None:  # fmt: skip
    """The result of tiles of which no two have a row in common, sink included; or their part of ``merged``, sink not."""
    found: list[tuple[Tile, Result]] = []
    for tile in tiles:
        y = _inputs(problem, tile, q, k, v, x, exclusive=True)
        out, lse, rest = attention_forward(
            y.q, y.k, y.v, y.bias, *y.numbers, y.mask, y.key_lengths, y.slopes, x.sink if merged is None and y.shift is None else None,
            _seed(problem, tile, x), problem.softcap, problem.dropout_p, problem.deterministic, y.second, *y.places,
        )  # fmt: skip
        if merged is not None:
            whole = in_base_2(lse, rest)
            merged.add(tile.rows, out, whole if y.shift is None else whole - y.shift)
            continue
        assert y.shift is None
        if tile.height == q.shape[1]:
            return Result(out, lse, rest if rest.dim() > 1 else None)
        found.append((tile, Result(out, lse, rest)))
    if merged is not None:
        return None
    if found and sum(tile.height for tile in tiles) == q.shape[1]:  # every row has its tile
        (B, M, H, _), kept = q.shape, found[0][1].rest
        lse = found[0][1].lse.new_empty((B, H, M))
        rest = None if kept is None or kept.dim() == 1 else kept.new_empty((B, H, M))
        result = Result(q.new_empty((B, M, H, v.shape[3])), lse, rest)
    else:
        empty = Merged(q, v.shape[3])
        sunk(empty, x, rows)
        result = empty.result(keeps(problem, x))
    for tile, part in found:
        result.out[:, tile.rows], result.lse[:, :, tile.rows] = part.out, part.lse
        if result.rest is not None and part.rest is not None:
            result.rest[:, :, tile.rows] = part.rest
    return result


def _seed(problem: Problem, tile: Tile, x: Extras) -> Tensor | None:
    """Dropout's, at the tile's place. Kernels of backend hopper want to know whether that is a multiple of 16."""
    if not problem.dropout_p or x.seed is None:
        return None
    return _counted_from(x.seed, (tile.row, tile.key, 0), tile.row % 16 == tile.key % 16 == 0)


def _counted_from(seed: Tensor, place: tuple[int, int, int], aligned: bool = False) -> Tensor:
    """A seed whose part begins further on, by so many queries, keys and heads. Nothing is copied from the host, for which a captured graph
    could not wait.
    """
    moved = torch.nn.functional.pad(seed, (0, 1), value=16) if aligned else seed.clone()
    for at, count in enumerate(place, 2):
        if count:
            moved[at : at + 1] += count
    return moved


def placed(seed: Tensor, heads: int, head: int = 0) -> Tensor:
    """(seed, offset) as the form that tells the place of a part: all of the whole, from a head on."""
    whole = torch.nn.functional.pad(seed, (0, 4))
    whole[4:5] = head
    whole[5:] = heads
    return whole


class Sums:
    """The gradients of one rank, as tiles add to them. None: not wanted.

    exclusive: every element of a bias's gradient comes from one tile, and is written there in the bias's own dtype. todo: the tiles, where
    these are all; else more are to come.
    """

    def __init__(self, x: Extras, needs: Sequence[bool], heads_whole: bool, todo: Sequence[Tile] | None = None) -> None:
        self.needs = needs
        self.exclusive = all(
            y is None or (y.shape[3] > 1 and y.shape[4] > 1 and (y.shape[2] > 1 or heads_whole)) for y in (x.bias, x.second)
        )
        self.dbias, self.dsecond = (
            self._new(y, todo) if need and y is not None else None for need, y in ((needs[3], x.bias), (needs[4], x.second))
        )
        self.dsink = x.sink.new_zeros(x.sink.shape, dtype=wide(x.sink.dtype)) if needs[5] and x.sink is not None else None

    def _new(self, y: Tensor, todo: Sequence[Tile] | None) -> Tensor:
        """Zeros, but for what tiles will write: a bias may be most of a GPU's memory."""
        if not self.exclusive or todo is None or not once(todo):
            return y.new_zeros(y.shape, dtype=y.dtype if self.exclusive else wide(y.dtype))
        grad, at = y.new_empty(y.shape), 0
        for tile in sorted(todo, key=lambda each: each.rows.start):
            grad[:, :, :, at : tile.rows.start] = 0
            grad[:, :, :, tile.rows, : tile.key] = 0
            grad[:, :, :, tile.rows, tile.key + tile.width :] = 0
            at = tile.rows.stop
        grad[:, :, :, at:] = 0
        return grad

    def heads(self, part: slice) -> Sums:
        """Those of some query heads; views."""
        other = object.__new__(Sums)
        other.needs, other.exclusive = self.needs, self.exclusive
        other.dbias, other.dsecond = (x if x is None or x.shape[2] == 1 else x[:, :, part] for x in (self.dbias, self.dsecond))
        other.dsink = None if self.dsink is None else self.dsink[part]
        return other


def zeros_but(x: Tensor, parts: Sequence[slice]) -> Tensor:
    """x, with zeros in dim 1 outside the parts."""
    at = 0
    for part in sorted(parts, key=lambda each: each.start):
        if part.start > at:
            x[:, at : part.start] = 0
        at = max(at, part.stop)
    if at < x.shape[1]:
        x[:, at:] = 0
    return x


def backward(
    problem: Problem, tiles: Sequence[Tile], q: Tensor, k: Tensor, v: Tensor, x: Extras, result: Result, dout: Tensor,
    dlse: Tensor | None, sums: Sums, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, more_rows: bool = False,
) -> None:  # fmt: skip
    """Add the gradients of the tiles to the sums, less that of the sink, and fill dk and dv (float32) and dq (of q's dtype where no row has
    two tiles, else float32). more_rows: dq has been begun, and is added to.
    """
    tiles = sorted(tiles, key=lambda tile: (tile.keys.start - tile.keys.stop, tile.keys.start))  # the widest first, which fills most
    single = once(tiles) and not more_rows
    if dq is not None and not more_rows:
        zeros_but(dq, [tile.rows for tile in tiles] if single else [])
    for y in (dk, dv):
        if y is not None:
            zeros_but(y, [tile.keys for tile in tiles[:1]])
    for n, tile in enumerate(tiles):
        grads = _gradients(problem, tile, q, k, v, x, result, dout, dlse, sums, (dq is not None, dk is not None, dv is not None))
        for total, part, grad, fresh in (
            (dq, tile.rows, grads[0], single), (dk, tile.keys, grads[1], n == 0), (dv, tile.keys, grads[2], n == 0)
        ):  # fmt: skip
            if total is not None and grad is not None:
                if fresh:
                    total[:, part] = grad
                else:
                    total[:, part] += grad


def _gradients(
    problem: Problem, tile: Tile, q: Tensor, k: Tensor, v: Tensor, x: Extras, result: Result, dout: Tensor, dlse: Tensor | None,
    sums: Sums, wants: tuple[bool, bool, bool],
) -> Sequence[Tensor | None]:  # fmt: skip
    """Those of q, k and v of one tile; those of the biases are added to the sums."""
    y = _inputs(problem, tile, q, k, v, x, sums.exclusive)
    rows = tile.rows
    lse, lost = _rows(result.lse, rows), q.new_empty(0, dtype=torch.float32)
    if y.shift is not None:
        lse, lost = split(in_base_2(lse, None if result.rest is None else _rows(result.rest, rows)) + y.shift, lse.dtype, True)
    elif result.rest is not None:
        lost = _rows(result.rest, rows)
    saved = (
        _rows_of(dout, rows), None if dlse is None else _rows(dlse, rows), y.q, y.k, y.v, y.bias, _rows_of(result.out, rows), lse, lost,
    )  # fmt: skip
    more = (y.mask, y.key_lengths, y.slopes, None, _seed(problem, tile, x), problem.softcap, problem.dropout_p, problem.deterministic)
    if sums.exclusive and sums.dbias is not None and y.second is None:
        own = [z.new_empty(z.shape) if want else None for z, want in zip((y.q, y.k, y.v), wants, strict=True)]
        attention_backward_(*saved, *y.numbers, *own, part_of(sums.dbias, tile), *more, *((None, *y.places) if y.places else ()))
        return own
    needs = [*wants, sums.dbias is not None, False]
    if y.second is not None:
        grads = attention_backward_two(*saved, *y.numbers, [*needs, sums.dsecond is not None], y.second, *more, *y.places)
    else:
        grads = (*attention_backward(*saved, *y.numbers, needs, *more, *y.places), None)
    for total, grad in ((sums.dbias, grads[3]), (sums.dsecond, grads[5])):
        if total is not None:
            part = part_of(total, tile)
            if sums.exclusive:
                part.copy_(grad)
            else:
                part += grad
    return grads[:3]


def _rows(x: Tensor, rows: slice) -> Tensor:
    """Some rows of ``(B, H, rows)``, contiguous."""
    return (x if rows.stop - rows.start == x.shape[2] else x[:, :, rows]).contiguous()


def sink_gradient(sums: Sums, x: Extras, result: Result, dout: Tensor, dlse: Tensor | None) -> None:
    """Add that of this rank's rows: a sink is a key of probability ``exp(sink - lse)`` whose value is 0."""
    if sums.dsink is None or x.sink is None:
        return
    dtype = sums.dsink.dtype
    delta = torch.einsum("bmhd,bmhd->bhm", result.out.to(dtype), dout.to(dtype))
    if dlse is not None:
        delta = delta - dlse
    p = torch.exp2((x.sink.double() * LOG2E)[:, None] - in_base_2(result.lse, result.rest)).to(dtype)
    sums.dsink -= (p * delta).masked_fill(result.lse == -math.inf, 0.0).sum((0, 2))
