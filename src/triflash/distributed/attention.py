"""The public function: what every rank gives is checked, what ranks must tell each other is told, and a method runs in one
``autograd.Function``.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..arguments import ATTENTION, Checked, Given, Options, band_of, check_places, checked, two_biases
from ..bound.cache import Recent
from ..checks import check_bool, check_seed_range, seed_tensor
from ..derivatives import differentiable_once
from ..errors import bad_type, bad_value
from ..form import Form
from ..hints import not_ours
from ..ops_checked import casting, is_casting
from ..plan.select import requested_backend_soon
from ..spec import resolve_precision
from .agree import agree, is_checking, rows_apart, values_of
from .all_gather import AllGather
from .call import Call, Saved
from .chunks import check_order, shares
from .group import Group, all_gather, exchange_numbers, process_group, refuse_transforms, refuse_unlike, resolve, wait
from .merging import Result
from .ring import Ring
from .shares import check_length, check_shares
from .tiles import Extras, Problem, placed
from .ulysses import Ulysses

__all__ = ["attend_part", "check_count", "check_method", "context_parallel_attention", "seed_of_all"]

METHODS: dict[str, Any] = {"allgather": AllGather, "ulysses": Ulysses, "ring": Ring}
CHUNK_PRODUCTS = 2e12  # floating-point operations of a chunk of heads, hidden ones among them: some 2 ms of an H200's


@overload
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any,
    method: str = "allgather",
    order: str = "zigzag",
    length: int | None = None,
    key_length: int | None = None,
    bias: Tensor | tuple[Tensor | None, ...] | None = None,
    mask: Tensor | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    diagonal: int | Tensor | None = None,
    query_starts: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: Literal[False] = False,
    deterministic: bool | None = None,
    layout: str = "bshd",
    precision: str | None = None,
    backend: str | None = None,
    head_chunks: int | None = None,
    programs: int | None = None,
) -> Tensor: ...
@overload
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any,
    return_lse: bool,
    method: str = "allgather",
    order: str = "zigzag",
    length: int | None = None,
    key_length: int | None = None,
    bias: Tensor | tuple[Tensor | None, ...] | None = None,
    mask: Tensor | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    diagonal: int | Tensor | None = None,
    query_starts: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool | None = None,
    layout: str = "bshd",
    precision: str | None = None,
    backend: str | None = None,
    head_chunks: int | None = None,
    programs: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *more: Any,
    group: Any = None,
    method: str = "allgather",
    order: str = "zigzag",
    length: int | None = None,
    key_length: int | None = None,
    bias: Tensor | tuple[Tensor | None, ...] | None = None,
    mask: Tensor | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    diagonal: int | Tensor | None = None,
    query_starts: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    layout: str = "bshd",
    precision: str | None = None,
    backend: str | None = None,
    head_chunks: int | None = None,
    programs: int | None = None,
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """``triflash.attention`` of sequences whose rows are spread over the ranks of a group; every rank calls it with its own.

    Results and all gradients are those of ``attention`` on the gathered tensors. With M and N the lengths over all ranks, and m and n
    those of this rank's shares (``shard`` makes them):

    Args:
        q: this rank's queries ``(*batch, m, Hq, D)``. k, v: its keys and values ``(*batch, n, Hk, D)``, ``(*batch, n, Hk, Dv)``.
        group: a ProcessGroup, a DeviceMesh of one dim, or ``(mesh, dim)``.
        method: ``"allgather"``: every rank gets all keys, chunk by chunk of heads. ``"ulysses"``: all-to-alls give every rank all rows of
            some heads; the group must divide Hq. ``"ring"``: keys go round, and memory beyond this rank's rows is two more shares.
        order: of rows, as of ``shard``: ``"zigzag"``, balanced for causal attention, or ``"contiguous"``.
        length, key_length: M and N. None: asked of the group once a call, for which the host waits; torch.compile needs both.
        bias, mask: this rank's rows in its order, all keys in their natural order: what broadcasts to ``(*batch, Hq, m, N)``; a bias may
            be a tuple of two.
        causal, window, scale, softcap, dropout_p, dropout_seed, return_lse, deterministic, layout, precision, backend: see
            ``triflash.attention``; positions are those in the whole sequence. Deterministic: partial gradients are exchanged whole
            and added in the order of ranks, else reduce-scattered.
        key_lengths, diagonal, query_starts, query_lengths, key_starts, alibi_slopes, sink: see there, the same on every rank; they number
            the queries and keys of the whole sequence.
        head_chunks: of method allgather, into how many chunks the heads are cut: one is gathered while the one before computes. Default:
            up to 4 on GPUs if each has milliseconds of work, 1 elsewhere. Other methods do not cut them.
        programs: at most how many SMs persistent grids use (backend hopper); default: all, but 8 while a collective is in flight.

    Returns:
        out ``(*batch, m, Hq, Dv)``, this rank's rows, or ``(out, lse)``.

    Gradients of a bias whose rows are this rank's are complete. Those of what every rank has (a bias without a dim of queries, the sink)
    come back summed over the group, the same on every rank: a wrapper that reduces over it again must average. Where every rank has one
    row, a bias with one row is that row's. Partial results, and gradients of k and v, travel in float32.

    Raises:
        ValueError, TypeError: a wrong argument, named; shares that are not those of the lengths, named by rank. With ``TRIFLASH_CHECK=1``
            in the environment when a group is first used, every call compares shapes and options over it; every rank raises what differs.
        UnsupportedError: heads that the group does not divide (ulysses), or what no backend can do.
        RuntimeError: a collective failed, because a process ended or hangs, within the group's time-out.

    Sources: Liu et al. 2023 (ring), Jacobs et al. 2023 (Ulysses).
    """
    if more or others:
        raise not_ours("context_parallel_attention", [*inspect.signature(context_parallel_attention).parameters][3:], more, others)
    ranks = resolve(group)
    number, diagonals = (None, diagonal) if isinstance(diagonal, Tensor) else (diagonal, None)
    options = Options(causal, window, scale, softcap, dropout_p, deterministic, layout, precision, backend, number)
    at = 2 if layout == "bhsd" else 3
    m, n = [x.shape[-at] if isinstance(x, Tensor) and not x.is_nested and x.dim() >= at else -1 for x in (q, k)]

    def told() -> dict[str, Any]:
        cast: tuple[Any, ...] = (q, k, v)
        if is_casting(q):
            with casting(cast) as cast:
                pass
        added = bias if isinstance(bias, (tuple, list)) else (bias,)
        biases = {f"bias[{n}]" if n else "bias": rows_apart(x, -2, m) for n, x in enumerate([x for x in added if x is not None])}
        return {
            "method": method, "order": order, "length": length, "key_length": key_length, "head_chunks": head_chunks,
            "programs": programs, "return_lse": return_lse, **options._asdict(), DETERMINISTIC: is_deterministic(deterministic),
            **{name: rows_apart(x, -at, rows) for name, x, rows in zip("qkv", cast, (m, n, n), strict=True)}, "bias": None,
            "bias[1]": None, **biases, "mask": rows_apart(mask, -2, m), "alibi_slopes": alibi_slopes, "sink": sink,
            "dropout_seed": values_of(dropout_seed), "diagonal": values_of(diagonal), "key_lengths": values_of(key_lengths),
            "query_starts": values_of(query_starts), "query_lengths": values_of(query_lengths), "key_starts": values_of(key_starts),
        }  # fmt: skip

    def check() -> tuple[Any, Any]:
        check_bool("return_lse", return_lse)
        first, second = two_biases(bias)
        refuse_transforms("context_parallel_attention", q=q, k=k, v=v, bias=first, sink=sink, **{"bias[1]": second})
        refuse_unlike(
            q=q, k=k, v=v, bias=first, mask=mask, key_lengths=key_lengths, alibi_slopes=alibi_slopes, sink=sink, dropout_seed=dropout_seed,
            query_starts=query_starts, query_lengths=query_lengths, key_starts=key_starts, diagonal=diagonal, **{"bias[1]": second},
        )  # fmt: skip
        check_order(order)
        for name, over_all, of, x, own in (("length", length, "q", q, m), ("key_length", key_length, "k", k, n)):
            if not isinstance(x, Tensor):
                raise bad_type(of, "a tensor", type(x).__name__)
            if over_all is not None and own >= 0:
                check_length(name, over_all, of, own, ranks, order)
        return first, second

    looks = False
    if torch.compiler.is_compiling():
        first, second = check()
    else:
        handle = process_group(group)
        first, second = agree(handle, ranks, (q, k, v), told, check)
        looks = is_checking(handle, q.device)
    given = Given(
        q, k, v, first, mask, key_lengths, alibi_slopes, sink, dropout_seed, second, query_starts, query_lengths, key_starts, diagonals
    )  # fmt: skip
    return attend_part(given, options, return_lse, ranks, method, order, (length, key_length), head_chunks, programs, looks=looks)


_parameters = [
    each.replace(default=inspect.Parameter.empty) if each.name == "group" else each
    for each in inspect.signature(context_parallel_attention).parameters.values()
    if each.name not in ("more", "others")
]
context_parallel_attention.__signature__ = inspect.signature(context_parallel_attention).replace(  # type: ignore[attr-defined]
    parameters=_parameters
)


DETERMINISTIC = "torch.use_deterministic_algorithms"


def is_deterministic(asked: bool | None) -> bool:
    """Whether a call is deterministic because PyTorch is asked to be, by which ranks add gradients up otherwise."""
    return asked is None and torch.are_deterministic_algorithms_enabled()


def check_method(method: object) -> None:
    """Raise ValueError unless ``method`` names one."""
    if method not in METHODS:
        raise bad_value("method", f"one of {', '.join(METHODS)}", repr(method))


def check_count(name: str, count: Any) -> None:
    """Raise unless it is None or a positive integer."""
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, int):
        raise bad_type(name, "an integer from 1 up, or None", type(count).__name__)
    if count < 1:
        raise bad_value(name, "an integer from 1 up, or None", count)


def attend_part(
    given: Given, options: Options, return_lse: bool, group: Group, method: str, order: str, lengths: tuple[int | None, int | None],
    head_chunks: int | None, programs: int | None, entry: int = 0, own_rows: tuple[bool, bool, bool] | None = None,
    looks: bool = False,
) -> Any:  # fmt: skip
    """This rank's part of a call. entry: the number of the first batch entry, to dropout. own_rows: of bias, second bias and mask, whether
    a single row is a rank's own, and not one that all share; None: to be found out. looks: whether values of lengths and places are read.
    """
    if is_casting(given.q):
        with casting(given) as cast:
            whole = Given._make((*cast, *given[3:]))
            return attend_part(whole, options, return_lse, group, method, order, lengths, head_chunks, programs, entry, own_rows, looks)
    key = _signature(given, options, lengths, group, method, order, head_chunks, programs, own_rows)
    known = None if key is None else _CALLS.get(key)
    if known is None:
        known = _settled(given, options, group, method, order, lengths, head_chunks, programs, own_rows)
        if key is not None and not known.told:
            _CALLS.add(key, known)
    elif isinstance(given.dropout_seed, int):
        check_seed_range(given.dropout_seed)
    form, call = known.form, known.call
    numbered = not (given.key_lengths is given.query_starts is given.query_lengths is given.key_starts is given.diagonals is None)
    if looks and numbered:
        check_places(given, call.problem)
    x = form.operands((*given[:8], None, None, None, None, None, given.second_bias, *given[10:]))
    seed = _seed(given, group, call.heads, entry) if call.problem.dropout_p else None
    k, v = x.k, x.v
    if torch.compiler.is_compiling():  # Dynamo takes no tensor twice
        k, v = k.view_as(k), v.view_as(v)
    out, lse = _Attend.apply(
        METHODS[method], call, x.q, k, v, x.bias, x.second_bias, x.sink, x.mask, x.key_lengths, x.alibi_slopes, seed,
        x.query_starts, x.query_lengths, x.key_starts, x.diagonal,
    )  # fmt: skip
    out = form.out_of(out)
    return (out, form.lse_of(lse)) if return_lse else out


class _Settled:
    """What calls of one signature share. told: whether the ranks had to tell each other something, which the next call's may tell again."""

    stamp = 0

    def __init__(self, form: Form, call: Call, told: bool) -> None:
        self.form, self.call, self.told = form, call, told


_CALLS: Recent[_Settled] = Recent(1024)


def _signature(given: Given, options: Options, lengths: tuple[int | None, int | None], *rest: Any) -> Any:
    """What checks and plans depend on. None: they must be made anew."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None
    slopes, window = given.alibi_slopes, options.window
    try:
        if isinstance(slopes, Tensor) and slopes.requires_grad and torch.is_grad_enabled():
            return None
        tensors = tuple([(x.shape, x.dtype, x.device, type(x)) if isinstance(x, Tensor) and not x.is_nested else type(x) for x in given])
        key = (
            tensors, options, tuple(map(type, options)), None if window is None else tuple(map(type, window)), lengths,
            tuple(map(type, lengths)), rest, tuple(map(type, rest)), options.backend or requested_backend_soon(),
            torch.are_deterministic_algorithms_enabled(), resolve_precision("") if options.precision is None else "",
        )  # fmt: skip
        hash(key)
    except (AttributeError, TypeError, RuntimeError):
        return None  # the checks have words for it
    return key


def _settled(
    given: Given, options: Options, group: Group, method: str, order: str, lengths: tuple[int | None, int | None],
    head_chunks: int | None, programs: int | None, own_rows: tuple[bool, bool, bool] | None,
) -> _Settled:  # fmt: skip
    """A call, checked and planned."""
    check_method(method)
    check_order(order)
    for name, count in (("head_chunks", head_chunks), ("programs", programs)):
        check_count(name, count)
    at = _rows_at(given, options)
    M, N, one_row, told = _lengths(given, group, order, lengths, at, own_rows)
    long = given._replace(k=_long(given.k, at, N), v=_long(given.v, at, N))  # type: ignore[arg-type]
    settled = checked(ATTENTION, long, options)
    x = settled.form.operands((*given[:8], None, None, None, None, None, given.second_bias, *given[10:]))
    return _Settled(settled.form, _call(settled, given, x, group, order, (M, N), one_row, head_chunks, programs, options), told)


def seed_of_all(seed: Tensor, drawn: bool, group: Group) -> Tensor:
    """(seed, offset) that every rank uses: where each has drawn its own, that of rank 0."""
    if not drawn or group.size == 1:
        return seed
    return wait(all_gather(seed[None], group), group)[0]


def _seed(given: Given, group: Group, heads: int, entry: int) -> Tensor:
    """The seed, and the place of a part."""
    seed = given.dropout_seed
    return placed(seed_of_all(seed_tensor(seed, given.q.device), seed is None, group), heads, entry * heads)


def _rows_at(given: Given, options: Options) -> int:
    """The dim of rows in q, k and v, of which the checks have the last word on wrong ones."""
    for name, x in zip("qkv", given, strict=False):
        if not isinstance(x, Tensor):
            raise bad_type(name, "a tensor", type(x).__name__)
        if x.dim() < 4:
            raise bad_value(name, "4 dims or more (*batch, length, heads, dim)", f"{x.dim()} dims {tuple(x.shape)}")
    return -2 if options.layout == "bhsd" else -3


def _long(x: Tensor, at: int, rows: int) -> Tensor:
    """A tensor of the whole problem's shape, for the checks, of which no element is read."""
    shape = list(x.shape)
    shape[at] = rows
    return x.new_empty(()).expand(shape)


def _lengths(
    given: Given, group: Group, order: str, lengths: tuple[int | None, int | None], at: int, own_rows: tuple[bool, bool, bool] | None
) -> tuple[int, int, tuple[bool, bool, bool], bool]:
    """M, N, and of bias, second bias and mask, where they have one row on a rank that holds one, whether that is the rank's. And whether
    the ranks told each other.
    """
    held = [given.q.shape[at], given.k.shape[at]]  # type: ignore[union-attr]
    biases = (given.bias, given.second_bias, given.mask)
    rows = [-1 if not isinstance(x, Tensor) or x.dim() < 2 else x.shape[-2] for x in biases]
    compiling = torch.compiler.is_compiling()
    names = (("length", "q"), ("key_length", "k"))
    for (name, of), own, length in zip(names, held, lengths, strict=True):
        if length is not None:
            check_length(name, length, of, own, group, order)
        elif compiling:
            raise bad_value(name, "the length over all ranks under torch.compile, which cannot ask the group", None)
    M, N = lengths
    # What every rank finds alike: how many rows a bias has here says nothing about another rank, that there is one does.
    asks = own_rows is None and M is not None and any(own >= 0 for own in rows)
    unclear = asks and 1 in (all_held := shares(M, group.size, order)) and set(all_held) != {1}  # type: ignore[arg-type]
    if unclear and compiling:
        raise bad_value("bias", f"shares of more than one row under torch.compile, length {M} on {group.size} ranks", list(all_held))
    asked = M is None or N is None or unclear
    if asked:
        told = exchange_numbers([*held, *rows], group, given.q.device)
        M = check_shares("q", "length", [each[0] for each in told], group, order) if M is None else M
        N = check_shares("k", "key_length", [each[1] for each in told], group, order) if N is None else N
        own_row = tuple(all(each[2 + n] == each[0] for each in told) for n in range(3))
    else:
        own_row = tuple(own == held[0] for own in rows)
    return M, N, own_row if own_rows is None else own_rows, asked  # type: ignore[return-value]


def _call(
    settled: Checked, given: Given, x: Any, group: Group, order: str, lengths: tuple[int, int], own_row: tuple[bool, bool, bool],
    head_chunks: int | None, programs: int | None, options: Options,
) -> Call:  # fmt: skip
    (M, N), held = lengths, x.q.shape[1]
    if x.bias is not None and given.bias is None:  # a mask alone
        own_row = (own_row[2], own_row[1], own_row[2])
    by_row, by_second, by_mask = (
        y is not None and (own if held == 1 else y.shape[3] == held)
        for own, y in zip(own_row, (x.bias, x.second_bias, x.mask), strict=True)
    )
    if options.diagonal is None:
        diagonal = 0 if options.causal == "top_left" else N - M
    else:
        diagonal = options.diagonal
    lo, hi = band_of(options.causal, options.window).offsets(M, N, options.diagonal if x.diagonal is None else 0)
    heads, key_heads = x.q.shape[2], x.k.shape[2]
    by_heads = tuple(y is not None and (y.shape[2] > 1 or heads == 1) for y in (x.bias, x.second_bias))
    problem = Problem(
        M, N, lo, hi, settled.form.inner, settled.scale, settled.softcap, settled.dropout_p, settled.precision, settled.backend,
        settled.deterministic, (by_row, by_second), diagonal, x.diagonal is not None,
    )  # fmt: skip
    if head_chunks is None:
        head_chunks = _chunks(x, by_heads, M, N, group.size)
    return Call(problem, group, order, heads, key_heads, head_chunks, programs, by_heads, by_mask)  # type: ignore[arg-type]


def _chunks(x: Any, by_heads: tuple[bool, ...], M: int, N: int, ranks: int) -> int:
    """As many chunks of heads as still fill a GPU with work that is long beside what the host takes to launch a chunk, up to 4; one where a
    bias is shared by heads, whose gradient would be added up.
    """
    if x.q.device.type == "cpu" or any(y is not None and not own for y, own in zip((x.bias, x.second_bias), by_heads, strict=True)):
        return 1
    B, _, H, D = x.q.shape
    chunks, tiles = min(4, x.k.shape[2]), B * H * -(-x.q.shape[1] // 128)
    products = 2 * B * H * M * N * (D + x.v.shape[3]) / ranks
    while chunks > 1 and (tiles // chunks < 512 or products < CHUNK_PRODUCTS * chunks):
        chunks //= 2
    return max(1, chunks)


class _Attend(torch.autograd.Function):
    """``_Attend.apply(method, call, q, k, v, *extras)``, canonical, extras as :class:`~.tiles.Extras` has them: out and lse."""

    @staticmethod
    def forward(ctx: Any, method: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, *extras: Tensor | None) -> tuple[Tensor, Tensor]:
        result, saved = method.forward(call, q, k, v, Extras(*extras))
        ctx.method, ctx.call = method, call
        ctx.shape = result.out.shape
        ctx.save_for_backward(*saved[:3], *saved.extras, *saved.result, *extras[:3])
        ctx.set_materialize_grads(False)
        return result.out, result.lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing: tuple[Tensor | None, ...] = (None,) * (5 + len(Extras._fields))
        if dout is None and dlse is None:
            return nothing
        q, k, v, *rest = ctx.saved_tensors
        count = len(Extras._fields)
        saved = Saved(q, k, v, Extras(*rest[:count]), Result(*rest[count : count + 3]))
        given = rest[count + 3 :]
        if dout is None:
            dout = q.new_zeros(ctx.shape)
        needs = ctx.needs_input_grad[2:8]
        with torch.no_grad():
            grads = list(ctx.method.backward(ctx.call, saved, dout, dlse, needs))
        for n, x in enumerate(given, 3):
            if grads[n] is not None:
                grads[n] = grads[n].to(x.dtype)
        tied = differentiable_once(grads, (dout, dlse, q, k, v, *given))
        return (None, None, *tied, *nothing[8:])
