"""What attention must satisfy whatever the inputs are, searched by hypothesis. The judge here is algebra, not the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from here import BACKENDS
from running import small_tiles
from triflash import ops

FEW = settings(
    max_examples=8,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
# float32 rounding of sums of a few dozen terms of size 1 to 10
CLOSE: dict[str, Any] = dict(rtol=1e-4, atol=2e-5)

sizes = st.integers(1, 36)
problems = st.fixed_dictionaries(
    {
        "B": st.integers(1, 2),
        "M": sizes,
        "N": sizes,
        "H": st.integers(1, 2),
        "D": st.sampled_from([1, 5, 8, 16]),
        "hi": st.one_of(st.none(), st.integers(-10, 30)),
        "lo": st.one_of(st.none(), st.integers(-30, 5)),
        "scale": st.sampled_from([0.0, 0.25, 1.0, -0.5]),
        "seed": st.integers(0, 2**20),
    }
)


class Problem:
    """q, k, v, a full bias and a cotangent for one drawn set of sizes, and the operators applied to them."""

    def __init__(self, drawn: dict[str, Any], backend: str, device: torch.device) -> None:
        self.B, self.M, self.N, self.H, self.D = (drawn[n] for n in ("B", "M", "N", "H", "D"))
        self.options = (1, drawn["lo"], drawn["hi"], drawn["scale"], "", backend)
        generator = torch.Generator().manual_seed(drawn["seed"])

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        self.q, self.dout = normal(self.B, self.M, self.H, self.D), normal(self.B, self.M, self.H, self.D)
        self.k, self.v = normal(self.B, self.N, self.H, self.D), normal(self.B, self.N, self.H, self.D)
        self.bias = normal(self.B, 1, self.H, self.M, self.N)
        self.normal = normal

    def forward(self, **changed: Any) -> tuple[Tensor, Tensor]:
        x = {"q": self.q, "k": self.k, "v": self.v, "bias": self.bias} | changed
        with small_tiles((32, 16)):
            return ops.attention_forward(x["q"], x["k"], x["v"], x["bias"], *self.options)[:2]

    def gradients(self, needs: str = "qkvb", dlse: Tensor | None = None, **changed: Any) -> dict[str, Tensor]:
        x = {"q": self.q, "k": self.k, "v": self.v, "bias": self.bias, "dout": self.dout} | changed
        inputs = (x["q"], x["k"], x["v"], x["bias"])
        with small_tiles((32, 16)):
            out, lse, rest = ops.attention_forward(*inputs, *self.options)
            grads = ops.attention_backward(x["dout"], dlse, *inputs, out, lse, rest, *self.options, [n in needs for n in "qkvb"])
        return dict(zip("qkvb", grads[:4], strict=True))


def assert_close(got: Tensor, wanted: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(got, wanted, **(CLOSE | tolerance))


@pytest.mark.parametrize("backend", BACKENDS)
@given(drawn=problems, shift=st.floats(-50, 50))
@FEW
def test_a_constant_per_row_moves_lse_and_nothing_else(drawn: dict[str, Any], shift: float, backend: str, device: torch.device) -> None:
    p = Problem(drawn, backend, device)
    (out, lse), (moved, moved_lse) = p.forward(), p.forward(bias=p.bias + shift)
    assert_close(moved, out, rtol=1e-3, atol=1e-4)  # the bias itself is rounded when the shift is added
    assert_close(moved_lse, lse + shift, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@given(drawn=problems)
@FEW
def test_permuting_keys_changes_nothing(drawn: dict[str, Any], backend: str, device: torch.device) -> None:
    p = Problem({**drawn, "lo": None, "hi": None}, backend, device)
    order = torch.randperm(p.N, generator=torch.Generator().manual_seed(drawn["seed"])).to(device)
    shuffled = {"k": p.k[:, order], "v": p.v[:, order], "bias": p.bias[..., order]}
    for a, b in zip(p.forward(), p.forward(**shuffled), strict=True):
        assert_close(a, b)
    a, b = p.gradients(), p.gradients(**shuffled)
    assert_close(a["q"], b["q"])
    for name, dim in (("k", 1), ("v", 1), ("b", 4)):
        assert_close(a[name].index_select(dim, order), b[name])


@pytest.mark.parametrize("backend", BACKENDS)
@given(drawn=problems)
@FEW
def test_heads_and_batch_entries_are_independent(drawn: dict[str, Any], backend: str, device: torch.device) -> None:
    p = Problem(drawn, backend, device)
    out, lse = p.forward()
    b, h = p.B - 1, p.H - 1
    one = {n: getattr(p, n)[b : b + 1, :, h : h + 1] for n in "qkv"} | {"bias": p.bias[b : b + 1, :, h : h + 1]}
    single_out, single_lse = p.forward(**one)
    assert_close(single_out[0, :, 0], out[b, :, h])
    assert_close(single_lse[0, 0], lse[b, h])


@pytest.mark.parametrize("backend", BACKENDS)
@given(drawn=problems, a=st.floats(-4, 4), b=st.floats(-4, 4))
@FEW
def test_out_is_linear_in_v_and_gradients_in_dout(drawn: dict[str, Any], a: float, b: float, backend: str, device: torch.device) -> None:
    p = Problem(drawn, backend, device)
    other = p.normal(*p.v.shape)
    mixed = p.forward(v=a * p.v + b * other)[0]
    assert_close(mixed, a * p.forward()[0] + b * p.forward(v=other)[0], atol=1e-4)
    dout = p.normal(*p.dout.shape)
    left, first, second = p.gradients(dout=a * p.dout + b * dout), p.gradients(), p.gradients(dout=dout)
    for name in "qkvb":
        assert_close(left[name], a * first[name] + b * second[name], atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@given(drawn=problems)
@FEW
def test_identities_of_the_gradients(drawn: dict[str, Any], backend: str, device: torch.device) -> None:
    """Rows of the bias gradient sum to the cotangent of lse (0 without one); q·dq and k·dk agree; dv sums to the dout of rows that see a key."""
    p = Problem(drawn, backend, device)
    grads = p.gradients()
    assert_close(grads["b"].sum(-1), torch.zeros_like(grads["b"][..., 0]), atol=1e-4)
    lse = p.forward()[1]
    seen = lse > -torch.inf
    dlse = p.normal(*lse.shape)
    assert_close(p.gradients(dlse=dlse)["b"].sum(-1)[:, 0], torch.where(seen, dlse, 0.0), atol=1e-4)
    assert_close((p.q * grads["q"]).sum((1, 3)), (p.k * grads["k"]).sum((1, 3)), atol=2e-3, rtol=1e-3)
    assert_close(grads["v"].sum(1), (p.dout * seen.transpose(1, 2)[..., None]).sum(1), atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@given(drawn=problems, dims=st.sampled_from([(0,), (2,), (3,), (4,), (0, 2), (3, 4), (0, 2, 3), (0, 2, 3, 4)]))
@FEW
def test_gradient_of_a_broadcast_bias_is_the_sum(drawn: dict[str, Any], dims: tuple[int, ...], backend: str, device: torch.device) -> None:
    p = Problem(drawn, backend, device)
    small = p.bias
    for dim in dims:
        small = small.narrow(dim, 0, 1)
    full = small.expand_as(p.bias)
    assert_close(p.gradients("b", bias=small)["b"], p.gradients("b", bias=full)["b"].sum(dims, keepdim=True), atol=5e-4)
    for a, b in zip(p.forward(bias=small), p.forward(bias=full), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@given(drawn=problems, cut=st.integers(1, 36))
@FEW
def test_a_causal_prefix_does_not_see_the_future(drawn: dict[str, Any], cut: int, backend: str, device: torch.device) -> None:
    p = Problem({**drawn, "hi": 0, "lo": None}, backend, device)
    cut = min(cut, p.M, p.N)
    out, lse = p.forward()
    k, v = p.k.clone(), p.v.clone()
    k[:, cut:], v[:, cut:] = 1e3, 1e6
    changed_out, changed_lse = p.forward(k=k, v=v)
    assert torch.equal(changed_out[:, :cut], out[:, :cut]) and torch.equal(changed_lse[..., :cut], lse[..., :cut])
    prefix, _ = p.forward(q=p.q[:, :cut], k=p.k[:, :cut], v=p.v[:, :cut], bias=p.bias[..., :cut, :cut])
    assert_close(prefix, out[:, :cut])


@pytest.mark.parametrize("backend", BACKENDS)
@given(drawn=problems)
@FEW
def test_a_band_a_mask_and_an_infinite_bias_are_the_same(drawn: dict[str, Any], backend: str, device: torch.device) -> None:
    """Three ways to hide a key, through different code, down to rows that see nothing."""
    p = Problem(drawn, backend, device)
    offset = torch.arange(p.N, device=device)[None, :] - torch.arange(p.M, device=device)[:, None]
    lo, hi = p.options[1:3]
    mask = (offset >= (-1000 if lo is None else lo)) & (offset <= (1000 if hi is None else hi))
    hidden = torch.zeros(mask.shape, device=device).masked_fill(~mask, -torch.inf)
    banded = p.forward(bias=None), p.gradients("qkv", bias=None)
    p.options = (1, None, None, *p.options[3:])
    for bias in (mask[None, None, None], hidden[None, None, None]):
        out, lse = p.forward(bias=bias)
        assert_close(out, banded[0][0])
        assert_close(lse, banded[0][1])
        grads = p.gradients("qkv", bias=bias)
        for name in "qkv":
            assert_close(grads[name], banded[1][name], atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@given(drawn=problems)
@FEW
def test_scale_and_bias_say_what_q_says(drawn: dict[str, Any], backend: str, device: torch.device) -> None:
    """Scaling q is scaling the scores; a bias is an extra feature of q and k; out lies within the values that are seen."""
    p = Problem({**drawn, "lo": None, "hi": None, "scale": 0.5}, backend, device)
    out, lse = p.forward()
    p.options = (*p.options[:3], 1.0, *p.options[4:])
    for a, b in zip(p.forward(q=0.5 * p.q), (out, lse), strict=True):
        assert_close(a, b)
    row = p.normal(p.B, p.N, p.H, 1)
    extended = p.forward(q=torch.cat([p.q, torch.ones_like(p.q[..., :1])], -1), k=torch.cat([p.k, row], -1), bias=None)
    biased = p.forward(bias=row.permute(0, 2, 3, 1)[:, None])
    for a, b in zip(extended, biased, strict=True):
        assert_close(a, b)
    assert (out <= p.v.amax(1, keepdim=True) + 1e-5).all() and (out >= p.v.amin(1, keepdim=True) - 1e-5).all()
