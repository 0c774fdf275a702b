"""What every result of a ``Case`` is held against, by the tolerance rule: the exact result, plain PyTorch's, and slack. Called by ``running.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from triflash import oracle
from triflash.cli.bench.tolerance import (
    FLOAT32_ULPS,
    GRADIENT_FACTOR,
    OUTPUT_FACTOR,
    STORED_FACTOR,
    Judgement,
    closed_backward,
    rounding_backward,
    unit_roundoff,
)  # fmt: skip
from triflash.dropout import keep_mask, rescale

if TYPE_CHECKING:
    from cases import Case, Inputs

HOPPER = ("hopper", "stand-in")


def five_dims(bias: Tensor | None) -> Tensor | None:
    """A bias as the operators take it: (outer, inner, head, query, key)."""
    if bias is None or bias.dim() == 5:
        return bias
    return bias[(None,) * (4 - bias.dim())].unsqueeze(1)


def judge(case: Case, inputs: Inputs, backend: str = "") -> dict[str, Judgement]:
    """What every result of the case is held against; Hopper's kernels round capped scores as if all were as large as the cap."""
    lo, hi = case.band
    numbers = dict(softcap=case.softcap, dropout_p=case.dropout)
    options: dict[str, Any] = dict(batch_inner=case.batch_inner, lo=lo, hi=hi, scale=case.softmax_scale, shift=case.shift, **numbers)
    wanted = inputs.wanted()

    def dense(dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        leaves = {n: x.detach().clone().requires_grad_() for n, x in wanted.items()}
        out, lse = oracle.attention(**inputs.replaced(leaves).dense, **options, dtype=dtype)
        if not leaves:
            return out, lse, {}
        outputs, cotangents = [out], [inputs.dout.to(dtype)]
        if inputs.dlse is not None:
            outputs, cotangents = [out, lse], [*cotangents, inputs.dlse.to(dtype)]
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True)
        return out.detach(), lse.detach(), dict(zip(leaves, grads, strict=True))

    # In float64 the gradients are taken with float64 leaves, so that they are not rounded to the inputs' dtype on their way out.
    kept_as_is = ("alibi_slopes",)
    exact_inputs = type(inputs)(
        **{
            n: x.detach().double() if x is not None and x.is_floating_point() and n not in kept_as_is else x
            for n, x in vars(inputs).items()
        }
    )
    out, lse, grads = _exact(exact_inputs, wanted, options)
    plain_out, _, plain_grads = dense(case.dtype)
    lse_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        plain_lse = oracle.attention(**inputs.operands().dense, **options, dtype=lse_dtype)[1]

    # Slack: see triflash/cli/bench/tolerance.py.
    x = exact_inputs
    s, slope, kept = _scores(case, x)
    group = case.H // case.key_heads if case.key_heads else 1
    k, v = (y.repeat_interleave(group, 2) for y in (x.k, x.v))
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, torch.inf)[..., None])
    stored = out.to(case.dtype).double()
    exact, shifted = (closed_backward(x.q, k, v, p, o, x.dout, x.dlse, case.softmax_scale, slope, kept) for o in (out, stored))
    rounding = rounding_backward(x.q, k, v, s, p, out, x.dout, x.dlse, case.softmax_scale, slope, kept)
    ulps = FLOAT32_ULPS * unit_roundoff(lse_dtype)
    size = s.masked_fill(s == -torch.inf, 0.0).abs()  # what float32 arithmetic rounds at
    top = size.amax(-1) if case.N else size.new_zeros(size.shape[:-1])

    def slack(letter: str) -> Tensor:
        def of(g: Any) -> Tensor:
            if letter == "s":
                assert x.sink is not None
                p_sink = torch.exp(x.sink[:, None] - lse).nan_to_num(0.0, 0.0)
                return (p_sink * (1 + lse.nan_to_num(neginf=0.0).abs()) * g.delta).sum((0, 2))
            if letter in "bt":
                own = five_dims(x.bias if letter == "b" else x.second_bias)
                return reduce_to_bias(g.ds, case, own).reshape(wanted[letter].shape)
            own = getattr(g, "d" + letter)
            return own if letter == "q" or group == 1 else own.unflatten(2, (-1, group)).sum(3)

        return ulps * of(rounding) + STORED_FACTOR * (of(shifted) - of(exact)).abs()

    out_slack = ulps * torch.einsum("bhmn,bnhd->bmhd", p * (1 + size) * (1 if kept is None else kept), v.abs())
    judgements = {
        "out": Judgement(out, plain_out, OUTPUT_FACTOR, case.dtype, out_slack),
        "lse": Judgement(lse, plain_lse, OUTPUT_FACTOR, lse_dtype, ulps * (1 + top) + 8e-7 * case.softcap * (backend in HOPPER)),
    }
    for letter in wanted:
        judgements["d" + letter] = Judgement(grads[letter], plain_grads[letter], GRADIENT_FACTOR, case.dtype, slack(letter))
    return judgements


def _scores(case: Case, x: Inputs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """In float64: the scores, the derivative of a soft cap, and what dropout multiplies probabilities by."""
    group = case.H // case.key_heads if case.key_heads else 1
    s = torch.einsum("bmhd,bnhd->bhmn", x.q, x.k.repeat_interleave(group, 2)) * case.softmax_scale
    slope = kept = None
    if case.softcap:
        t = torch.tanh(s / case.softcap)
        s, slope = case.softcap * t, 1 - t * t
    for extra in (five_dims(x.bias), five_dims(x.second_bias), five_dims(x.mask)):
        if extra is not None and s.numel():
            extra = torch.where(extra, 0.0, -torch.inf) if extra.dtype == torch.bool else extra
            s = (s.unflatten(0, (-1, case.batch_inner)) + extra).flatten(0, 1)
    i, j = torch.arange(case.M, device=s.device)[:, None], torch.arange(case.N, device=s.device)
    if x.alibi_slopes is not None:
        standing = case.N - case.M if case.shift is None else case.shift
        standing = standing if x.diagonal is None else x.diagonal[:, None, None, None]
        s = s - x.alibi_slopes.double()[..., None, None] * (i + standing - j).abs()
    moved = j - i if x.diagonal is None else j - i - x.diagonal[:, None, None, None]
    for hidden in (None if case.band[0] is None else moved < case.band[0], None if case.band[1] is None else moved > case.band[1]):
        s = s if hidden is None else s.masked_fill(hidden, -torch.inf)
    if x.key_lengths is not None:
        s = s.masked_fill(j >= x.key_lengths[:, None, None, None], -torch.inf)
    for at, bound, least in ((i, x.query_starts, True), (i, x.query_lengths, False), (j, x.key_starts, True)):
        if bound is not None:
            s = s.masked_fill((at < bound[:, None, None, None]) if least else (at >= bound[:, None, None, None]), -torch.inf)
    if x.dropout_seed is not None:
        kept = keep_mask(x.dropout_seed, case.dropout, case.B, case.H, slice(0, case.M), slice(0, case.N)) * rescale(case.dropout)
    return s, slope, kept


def _exact(x: Inputs, wanted: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The oracle in float64 and, by autograd, the gradients that are wanted."""
    named = zip("qkvbst", (x.q, x.k, x.v, x.bias, x.sink, x.second_bias), strict=True)
    leaves = {n: t.requires_grad_() for n, t in named if n in wanted and t is not None}
    out, lse = oracle.attention(**x.replaced(leaves).dense, **options)
    grads: tuple[Tensor, ...] = ()
    if leaves:
        outputs, cotangents = ([out], [x.dout]) if x.dlse is None else ([out, lse], [x.dout, x.dlse])
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True)
    for t in leaves.values():
        t.requires_grad_(False)
    return out.detach(), lse.detach(), dict(zip(leaves, grads, strict=True))


def reduce_to_bias(ds: Tensor, case: Case, bias5: Tensor | None) -> Tensor:
    """The gradient of the scores summed over the dims that the bias broadcasts."""
    assert bias5 is not None
    return ds.unflatten(0, (-1, case.batch_inner)).sum_to_size(bias5.shape) if ds.numel() else torch.zeros_like(bias5)
