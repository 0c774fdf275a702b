"""Attention layers of protein-folding models, whose pair bias trains through :func:`triflash.attention`.

Called by programs; imports PyTorch, the front door and the checks. Parameters have the names that OpenFold's and OpenFold-3's code gives
them, so that their state dicts load.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..attention import attention
from ..checks import check_bool
from ..errors import bad_type, bad_value

__all__ = ["PairBiasAttention", "TriangleAttention"]

_ROW_MULTIPLE = 16  # elements between rows of a bias that every kernel reads without a copy


class TriangleAttention(nn.Module):
    """Attention of each row of a pair representation to itself, with a bias from the third edge of the triangle.

    With ``x' = LayerNorm(x)``, ``q, k, v`` and a bias b of H values projected from ``x'``, for each head::

        starting node    out_ij = Σ_k softmax_k(q_ij · k_ik / sqrt(c_hidden) + b_jk) v_ik
        ending node      out_ij = Σ_k softmax_k(q_ij · k_kj / sqrt(c_hidden) + b_ki) v_kj

    and the result is ``Linear(sigmoid(Linear(x')) * out)``, without the residual.

    Args:
        c_in: channels of the pair representation. c_hidden: D, of one head. no_heads: H.
        starting: the starting node; False: the ending node, by transposing the pairs.
        offsets: whether the gate's and the output's projection have an offset: AlphaFold 2, OpenFold and ESMFold True, AlphaFold 3,
            OpenFold-3, Boltz and Protenix False.
        device, dtype: of the parameters.

    Parameters: ``layer_norm``, ``linear`` (the bias's), ``mha.linear_q``, ``_k``, ``_v``, ``_g``, ``_o``, as OpenFold's; where a state dict
    has the bias's as ``linear_z``, as OpenFold-3's, it is taken too. Initial values, as there: the output's projection is 0, the gate is
    constant.

    >>> layer = TriangleAttention(128, 32, 4)
    >>> z = z + layer(z, mask)

    Sources: AlphaFold 2 (Jumper et al. 2021), algorithms 13 and 14; AlphaFold 3 (Abramson et al. 2024), algorithms 14 and 15.
    """

    def __init__(
        self,
        c_in: int,
        c_hidden: int,
        no_heads: int,
        starting: bool = True,
        *,
        offsets: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(c_in=c_in, c_hidden=c_hidden, no_heads=no_heads)
        self.starting = check_bool("starting", starting)
        check_bool("offsets", offsets)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layer_norm = nn.LayerNorm(c_in, **place)
        self.linear = nn.Linear(c_in, no_heads, bias=False, **place)
        self.register_load_state_dict_pre_hook(_other_names)
        self.mha = _GatedAttention(c_in, c_hidden, no_heads, {"g", "o"} if offsets else set(), place)
        nn.init.kaiming_normal_(self.linear.weight, nonlinearity="linear")
        nn.init.zeros_(self.mha.linear_o.weight)

    def extra_repr(self) -> str:
        return f"starting={self.starting}"

    def forward(self, x: Tensor, mask: Tensor | None = None, *, key_lengths: Tensor | None = None) -> Tensor:
        """The update ``(*, N, N, c_in)`` in the projections' dtype.

        Args:
            x: pairs ``(*, N, N, c_in)``.
            mask: ``(*, N, N)``, x's dims but the last: bool, or numbers of which 0 hides a pair and every other shows it.
            key_lengths: integers ``(*)``: how many of the N tokens are there; those from that number on are hidden as keys. For padding at
                the end instead of a mask, or beside one.

        Raises:
            ValueError, TypeError: a wrong shape or dtype; the message names the argument.

        A row that sees no pair gets the output's offset or 0 (OpenFold: the gated mean of its values); it is of no meaning in either, as it
        is itself masked. Scores are not in memory; q, k, v, the gate and the bias are.
        """
        _check_last("x", x, self.layer_norm.normalized_shape[0], "(*, N, N, c_in)", 3)
        *batch, N, M, _ = x.shape
        if N != M:
            raise bad_value("x", "as many rows as columns (*, N, N, c_in)", tuple(x.shape))
        shown = None
        if mask is not None:
            shown = _as_bool("mask", mask, (*batch, N, N), "(*, N, N)")
            shown = shown if self.starting else shown.mT
            shown = shown[..., :, None, None, :]
        if key_lengths is not None:
            if not isinstance(key_lengths, Tensor):
                raise bad_type("key_lengths", "a tensor of integers or None", type(key_lengths).__name__)
            if list(key_lengths.shape) != batch:
                raise bad_value("key_lengths", f"shape {tuple(batch)}, one for each of x's batch entries", tuple(key_lengths.shape))
            key_lengths = key_lengths.unsqueeze(-1).expand(*batch, N)
        if not self.starting:
            x = x.transpose(-2, -3)
        x = self.layer_norm(x)
        bias = _heads_first(self.linear(x)).unsqueeze(-4)
        out: Tensor = self.mha(x, bias, shown, key_lengths)
        return out if self.starting else out.transpose(-2, -3)


class PairBiasAttention(nn.Module):
    """Attention of tokens with a bias from their pair representation: AlphaFold 3's AttentionPairBias.

    With ``a' = LayerNorm(a)``, or adaptive by s, and q, k, v projected from it, for each head::

        out_i = Σ_j softmax_j(q_i · k_j / sqrt(c_hidden) + Linear(LayerNorm(z_ij)) + beta_ij) v_j

    and the result is ``Linear(sigmoid(Linear(a')) * out)``, where there is an s times ``sigmoid(Linear(s))``, without the residual.

    Args:
        c_a: channels of the tokens. c_z: of the pairs. c_hidden: D, of one head. no_heads: H.
        c_s: channels of the conditioning, where there is one: the layer norm of a is ``sigmoid(Linear(s')) * LayerNorm(a) + Linear(s')``
            with ``s' = LayerNorm(s)``, as in the diffusion transformer. None: none, as in the Pairformer.
        pair_offset: whether the layer norm of z has an offset (OpenFold-3: in the Pairformer, not in the diffusion transformer).
        device, dtype: of the parameters.

    Parameters: ``layer_norm_a``, ``layer_norm_z``, ``linear_z``, ``mha.linear_q`` (with an offset), ``_k``, ``_v``, ``_g``, ``_o`` and,
    with c_s, ``linear_ada_out``, as OpenFold-3's. Initial values, as there: without c_s the output's projection is 0, with it the last
    gate is sigmoid(−2).

    >>> layer = PairBiasAttention(384, 128, 24, 16)
    >>> s = s + layer(s, z, mask=mask)

    Source: AlphaFold 3 (Abramson et al. 2024), algorithms 24 and 26.
    """

    def __init__(
        self,
        c_a: int,
        c_z: int,
        c_hidden: int,
        no_heads: int,
        *,
        c_s: int | None = None,
        pair_offset: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(c_a=c_a, c_z=c_z, c_hidden=c_hidden, no_heads=no_heads, **({} if c_s is None else {"c_s": c_s}))
        check_bool("pair_offset", pair_offset)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.c_a, self.c_s = c_a, c_s
        self.layer_norm_a = nn.LayerNorm(c_a, **place) if c_s is None else _AdaptiveLayerNorm(c_a, c_s, place)
        self.layer_norm_z = nn.LayerNorm(c_z, bias=pair_offset, **place)
        self.linear_z = nn.Linear(c_z, no_heads, bias=False, **place)
        self.mha = _GatedAttention(c_a, c_hidden, no_heads, {"q"}, place)
        nn.init.kaiming_normal_(self.linear_z.weight, nonlinearity="linear")
        if c_s is None:
            nn.init.zeros_(self.mha.linear_o.weight)
        else:
            self.linear_ada_out = nn.Linear(c_s, c_a, **place)
            nn.init.zeros_(self.linear_ada_out.weight)
            nn.init.constant_(self.linear_ada_out.bias, -2.0)

    def forward(
        self,
        a: Tensor,
        z: Tensor,
        s: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        beta: Tensor | None = None,
        key_lengths: Tensor | None = None,
    ) -> Tensor:
        """The update ``(*, N, c_a)`` in the projections' dtype.

        Args:
            a: tokens ``(*, N, c_a)``, one batch dim or more.
            z: pairs ``(*, N, N, c_z)``; batch dims may be 1: noised samples ``(B, samples, N, c_a)`` share pairs ``(B, 1, N, N, c_z)``, of
                which the bias is then computed once.
            s: conditioning ``(*, N, c_s)``, if and only if the layer has c_s; batch dims may be 1.
            mask: of keys, ``(*, N)``: bool, or numbers of which 0 hides a token and every other shows it. Batch dims may be 1.
            beta: of pairs, ``(*, N, N)``, batch dims may be 1: bool (True = visible), or floats that are added and have a gradient.
            key_lengths: integers ``(*)``, for padding at the end: how many of the N tokens are there.

        Raises:
            ValueError, TypeError: a wrong shape or dtype; the message names the argument.
            UnsupportedError: z, beta and mask vary over batch dims that are not two groups of neighbours (docs/semantics.md).

        A token that sees no key gets 0. Floats as beta make two biases, which backend ``hopper`` does not take.
        """
        _check_last("a", a, self.c_a, "(*, N, c_a)", 3)
        *batch, N, _ = a.shape
        _check_last("z", z, self.layer_norm_z.normalized_shape[0], "(*, N, N, c_z)", a.dim() + 1)
        _check_broadcast("z", z.shape[:-1], (*batch, N, N), "(*, N, N, c_z)")
        if (s is None) != (self.c_s is None):
            raise bad_value("s", "None, as the layer has no c_s" if self.c_s is None else f"a tensor (*, N, c_s={self.c_s})",
                            "a tensor" if self.c_s is None else "None")  # fmt: skip
        if s is None:
            normed = self.layer_norm_a(a)
        else:
            assert self.c_s is not None
            _check_last("s", s, self.c_s, "(*, N, c_s)", a.dim())
            _check_broadcast("s", s.shape[:-1], (*batch, N), "(*, N, c_s)")
            normed = self.layer_norm_a(a, s)
        shown = None
        if mask is not None:
            shown = _as_bool("mask", mask, (*batch, N), "(*, N)")[..., None, None, :]
        bias: Any = _heads_first(self.linear_z(self.layer_norm_z(z)))
        if beta is not None:
            if not isinstance(beta, Tensor) or not (beta.dtype == torch.bool or beta.is_floating_point()):
                raise bad_type("beta", "a tensor of floats or bools", beta.dtype if isinstance(beta, Tensor) else type(beta).__name__)
            _check_broadcast("beta", beta.shape, (*batch, N, N), "(*, N, N)")
            beta = beta.unsqueeze(-3)
            if beta.dtype != torch.bool:
                bias = (bias, beta)
            else:
                shown = beta if shown is None else beta & shown
        out: Tensor = self.mha(normed, bias, shown, key_lengths)
        return out if s is None else torch.sigmoid(self.linear_ada_out(s)) * out


def _other_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """OpenFold-3's name of the bias's projection, as OpenFold's."""
    if f"{prefix}linear_z.weight" in state and f"{prefix}linear.weight" not in state:
        state[f"{prefix}linear.weight"] = state.pop(f"{prefix}linear_z.weight")


class _GatedAttention(nn.Module):
    """``Linear(sigmoid(Linear(x)) * attention(Linear(x), …))``, heads of D channels. offsets: letters of the projections that have one."""

    def __init__(self, channels: int, D: int, H: int, offsets: set[str], place: dict[str, Any]) -> None:
        super().__init__()
        self.H = H
        self.linear_q = nn.Linear(channels, H * D, bias="q" in offsets, **place)
        self.linear_k = nn.Linear(channels, H * D, bias=False, **place)
        self.linear_v = nn.Linear(channels, H * D, bias=False, **place)
        self.linear_g = nn.Linear(channels, H * D, bias="g" in offsets, **place)
        self.linear_o = nn.Linear(H * D, channels, bias="o" in offsets, **place)
        for each in (self.linear_q, self.linear_k, self.linear_v):
            nn.init.xavier_uniform_(each.weight)
        nn.init.zeros_(self.linear_g.weight)
        for each, value in ((self.linear_q, 0.0), (self.linear_g, 1.0), (self.linear_o, 0.0)):
            if each.bias is not None:
                nn.init.constant_(each.bias, value)

    def forward(self, x: Tensor, bias: Any, mask: Tensor | None, key_lengths: Tensor | None) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (self.H, -1)) for each in (self.linear_q, self.linear_k, self.linear_v))
        out = attention(q, k, v, bias=bias, mask=mask, key_lengths=key_lengths)
        return self.linear_o(torch.sigmoid(self.linear_g(x)) * out.flatten(-2))


class _AdaptiveLayerNorm(nn.Module):
    """``sigmoid(Linear(s')) * LayerNorm(a) + Linear(s')`` with ``s' = LayerNorm(s)``: AlphaFold 3's algorithm 26."""

    def __init__(self, c_a: int, c_s: int, place: dict[str, Any]) -> None:
        super().__init__()
        self.layer_norm_a = nn.LayerNorm(c_a, elementwise_affine=False, **place)
        self.layer_norm_s = nn.LayerNorm(c_s, bias=False, **place)
        self.linear_g = nn.Linear(c_s, c_a, **place)
        self.linear_s = nn.Linear(c_s, c_a, bias=False, **place)
        for each in (self.linear_g.weight, self.linear_g.bias, self.linear_s.weight):
            nn.init.zeros_(each)

    def forward(self, a: Tensor, s: Tensor) -> Tensor:
        s = self.layer_norm_s(s)
        return torch.sigmoid(self.linear_g(s)) * self.layer_norm_a(a) + self.linear_s(s)


def _heads_first(bias: Tensor) -> Tensor:
    """``(*, M, N, H)`` to ``(*, H, M, N)``, in memory too, rows padded to where kernels read them as they lie, in both passes."""
    # Contiguous first: padding keeps the order of dims, channels last, that a permuted tensor has.
    bias = bias.movedim(-1, -3).contiguous()
    N = bias.shape[-1]
    if torch.compiler.is_exporting() and type(N) is not int:
        return bias  # one program for all lengths asks nothing of them; kernels copy such rows
    return nn.functional.pad(bias, (0, -N % _ROW_MULTIPLE))[..., :N] if N % _ROW_MULTIPLE else bias


def _check_sizes(**sizes: Any) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise bad_type(name, "a whole number", repr(value))
        if value < 1:
            raise bad_value(name, "1 or more", value)


def _check_last(name: str, x: Any, channels: int, words: str, least: int) -> None:
    if not isinstance(x, Tensor):
        raise bad_type(name, "a tensor", type(x).__name__)
    if x.dim() < least or x.shape[-1] != channels:
        raise bad_value(name, f"{least} dims or more {words}, of which the last has {channels} channels", tuple(x.shape))


def _check_broadcast(name: str, shape: torch.Size, full: tuple[int, ...], words: str) -> None:
    """Sizes may be symbolic. Batch dims alone may be 1."""
    batch = len(full) - words.count("N")
    fits = len(shape) == len(full) and all(
        own == size or (at < batch and own == 1) for at, (own, size) in enumerate(zip(shape, full, strict=True))
    )
    if not fits:
        raise bad_value(name, f"{words} that fits {full}, of which batch dims may be 1", tuple(shape))


def _as_bool(name: str, mask: Any, full: tuple[int, ...], words: str) -> Tensor:
    if not isinstance(mask, Tensor):
        raise bad_type(name, "a tensor of bools or numbers, or None", type(mask).__name__)
    _check_broadcast(name, mask.shape, full, words)
    return mask if mask.dtype == torch.bool else mask != 0
