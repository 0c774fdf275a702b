"""The portable kernels that walk blocks (``kernels/triton/forward.py``, ``backward.py``, ``dbias.py``): configuration, products, order and
grid.

Called by ``plan/triton.py``, ``plan/packed.py``, explain and ``triflash tune``. Pure. What they support is what backend ``triton`` does
(``select.why_not``); the shared memory of a tile, which the compiler allocates, is estimated in ``plan/configs.py``.
"""

from __future__ import annotations

from ...errors import bad_value, unsupported
from ...spec import UNSET, AttentionSpec, BiasSpec, Needs
from .. import tables
from ..choices import Choices
from ..configs import (
    Problem,
    TileConfig,
    chosen,
    default_config,
    misread,
    of_both,
    others_chosen,
    padded,
    problem_like,
    with_features,
    with_wide_bias,
)
from ..device import DeviceFacts
from ..steps import Step, asked_products, broadcast_rows, ceil_div, dbias_source
from . import few
from .packed import most_tiles, packed_of
from .parts import dbias_sum_steps, sum_rows_steps

__all__ = [
    "Sources", "bias_sources", "config_of", "dbias_steps", "delta_step", "dkdv_steps", "dq_steps", "forward_steps", "order_of",
    "packed_step", "problem_of", "products_of", "l2_group_of",
]  # fmt: skip

KEYS_APART = 512  # of the shortest sequences that two launches were judged on
WARPS_AT_A_TIME = 8  # of an SM, where a thread takes all the registers that it may

Sources = dict[str, tuple[str, BiasSpec]]  # by name of a gradient: which kernel gives it, and the bias


def products_of(kernel: str, spec: AttentionSpec, device: DeviceFacts) -> str:
    """How a portable kernel multiplies float32 elements: ``"ieee"`` (FMA units), ``"tf32"``, or ``"tf32x3"``, three products for one.

    Where nobody chose: three TF32 products on NVIDIA's tensor cores for kernels and head dims that passed the rule so, else ieee.
    """
    if spec.dtype != "fp32":
        return "ieee"
    if spec.precision != UNSET:
        return spec.precision
    if few.has_few_queries(spec):
        return asked_products(spec)  # a backward pass must find the scores of its forward pass
    passed = (of_both(kernel), padded(max(spec.head_dim, spec.value_dim))) in tables.THREE_TF32
    return "tf32x3" if passed and device.arch.startswith("sm") else "ieee"


def problem_of(kernel: str, spec: AttentionSpec, device: DeviceFacts | None = None) -> Problem:
    """The part of a spec by which a kernel's configuration is chosen; device: needed where nobody chose how float32 is multiplied."""
    banded = spec.lo is not None or spec.hi is not None
    head_dim = padded(max(spec.head_dim, spec.value_dim))
    products = "ieee" if spec.dtype != "fp32" else spec.precision if device is None else products_of(kernel, spec, device)
    amd = device is not None and device.arch.startswith("gfx")  # whose tiles for float32 are the same, whatever multiplies them
    by_tensor_cores = products if products in ("tf32", "tf32x3") and not amd else ""
    return problem_like(kernel, head_dim, 4 if spec.dtype == "fp32" else 2, spec.bias is not None, banded, by_tensor_cores)


def config_of(kernel: str, spec: AttentionSpec, device: DeviceFacts, choices: Choices) -> tuple[TileConfig, str]:
    """A kernel's configuration and where it comes from: by hand, else a tuned file, else a measured row, else the analytic default."""
    problem = problem_of(kernel, spec, device)
    if (own := chosen(dict(choices.by_hand), kernel, TileConfig)) is not None:
        if kernel != "delta" and (wrong := misread(problem, own)):
            raise bad_value(f"override_configs({kernel}=…)", "tiles of 32 rows and more, or 4 warps", own, wrong)
        return own, "chosen by hand (override_configs)"
    config, source = _measured_or_default(kernel, problem, spec, device, choices)
    weight = _weight(spec, problem.products) if device.arch.startswith("sm") else 0  # AMD's registers suffice
    lighter = with_features(problem, config, weight)
    if lighter is not config and lighter != config and kernel != "delta" and not misread(problem, lighter):
        return lighter, f"{source}, with fewer scores a thread than {config} for what they go through"
    return config, source


def _measured_or_default(
    kernel: str, problem: Problem, spec: AttentionSpec, device: DeviceFacts, choices: Choices
) -> tuple[TileConfig, str]:
    if choices.tuned is not None and (config := choices.tuned.lookup(problem, device)) and not misread(problem, config):
        source = f"tuned, {choices.tuned.path}"
    elif row := tables.lookup(device.arch, problem, spec.keys if spec.packed is None else None):
        config, source = row.config, f"measured on {tables.MEASURED_ON.get(device.arch, device.arch)} (row of plan/tables.py)"
    elif kernel == "delta":
        return default_config(problem, device), "fixed: it has no tiles of scores"
    else:
        return default_config(problem, device), "analytic default: the first candidate that fits, not measured"
    # A second bias is one more buffer, as a float32 one is twice as much.
    doubled = spec.second is not None or (spec.bias is not None and spec.bias.dtype == "fp32")
    if doubled and kernel != "delta":
        narrower = with_wide_bias(problem, config, device)
        if narrower != config:
            return narrower, f"{source}, with fewer stages than {config} to hold a float32 bias"
    return config, source


def _weight(spec: AttentionSpec, products: str) -> int:
    """How much scores go through on their way, as :func:`with_features` counts it. products: TF32's, which leave fewer registers."""
    packed_bias = spec.packed is not None and spec.bias is not None  # whose rows and columns end anywhere
    weight = (spec.softcap > 0) + spec.alibi + (spec.mask is not None) + (spec.dropout > 0) + packed_bias + spec.placed
    if products:
        weight += (spec.packed is not None) + (spec.second is not None) + (spec.bias is not None and spec.bias.is_mask)
    return weight


def order_of(spec: AttentionSpec) -> str:
    """Which index of the grid varies fastest: tiles that share a bias block run back to back, else those that share keys."""
    bias = spec.bias
    if spec.second is not None and not (bias is not None and bias.varies[3]):  # the larger of two
        bias = spec.second
    if bias is not None:
        outer, inner, head, _, _ = bias.varies
        if spec.batch > 1 and not (outer and inner):
            return "batch"
        if spec.heads > 1 and not head:
            return "head"
    return "tile" if spec.hi is None and spec.lo is None else "heavy"


def l2_group_of(order: str, config: TileConfig, device: DeviceFacts) -> int:
    """How many programs are ordered by length before the next: two for each that runs at a time. Then a cache holds the rows that several
    tiles of a head read, as with order ``"tile"``, and the last section's longest rows still begin while every SM has others to do.
    """
    return 2 * device.sms * max(1, WARPS_AT_A_TIME // config.num_warps) if order == "heavy" else 0


def forward_steps(spec: AttentionSpec, device: DeviceFacts, config: TileConfig) -> tuple[Step, ...]:
    """The forward kernel; none of an empty output."""
    programs = ceil_div(spec.queries, config.block_m) * spec.heads * spec.batch
    order = order_of(spec)
    l2_group = l2_group_of(order, config, device)
    step = Step("forward", config, programs, order, precision=products_of("forward", spec, device), l2_group=l2_group)
    return (step,) if programs else ()


def delta_step(spec: AttentionSpec, device: DeviceFacts, choices: Choices, dsink: bool) -> Step:
    """The kernel for delta, from which the gradient of a sink follows."""
    config, _ = config_of("delta", spec, device, choices)
    programs = ceil_div(spec.queries, config.block_m) * spec.batch * spec.heads
    return Step("delta", config, programs, gives=("dsink",) * dsink)


def dkdv_steps(spec: AttentionSpec, device: DeviceFacts, choices: Choices, gives: tuple[str, ...], sources: Sources) -> tuple[Step, ...]:
    """The kernel that owns keys, for such of the gradients ``gives`` as are its own: one launch, or one each (:func:`_apart`)."""
    biases = _from("dkdv", sources)
    own = (*(name for name in ("dk", "dv") if name in gives), *biases)
    if not own:
        return ()
    order, pairs = order_of(spec), spec.batch * spec.kv_heads
    if not biases and _apart(own, spec, device, choices):
        products = products_of("dkdv", spec, device)
        tiles = {name: config_of(name, spec, device, choices)[0] for name in own}
        return tuple(
            Step(
                name,
                config,
                ceil_div(spec.keys, config.block_n) * pairs,
                order,
                gives=(name,),
                precision=products,
                l2_group=l2_group_of(order, config, device),
            )
            for name, config in tiles.items()
        )
    config, _ = config_of("dkdv", spec, device, choices)
    programs = ceil_div(spec.keys, config.block_n) * pairs
    splits = broadcast_rows(spec, sources[biases[0]][1]) if biases else 1
    products, l2_group = products_of("dkdv", spec, device), l2_group_of(order, config, device)
    return (Step("dkdv", config, programs, order, splits, own, products, l2_group=l2_group),)


def _apart(own: tuple[str, ...], spec: AttentionSpec, device: DeviceFacts, choices: Choices) -> bool:
    """Whether dk and dv come from a launch each of the kernel for both: q kᵀ is then multiplied twice, five products instead of four, but
    each launch has the registers for itself, which at head dim 256 both accumulators do not fit.

    So where there are rows for that, on as many keys as those were judged on, and where configurations for it are chosen by hand.
    """
    by_hand = dict(choices.by_hand)
    if others_chosen(by_hand, "dkdv") or others_chosen(by_hand, *own):
        return others_chosen(by_hand, *own)
    if spec.keys < KEYS_APART or spec.second is not None:
        return False
    return all(tables.lookup(device.arch, problem_of(name, spec, device), spec.keys) for name in own) and not _weight(spec, "")


def dq_steps(spec: AttentionSpec, device: DeviceFacts, choices: Choices, gives: tuple[str, ...], sources: Sources) -> tuple[Step, ...]:
    """The kernel that owns queries, for such of the gradients ``gives`` as are its own; where queries are few, parts and their sum."""
    own = (*(name for name in ("dq",) if name in gives), *_from("dq", sources))
    if not own:
        return ()
    config, _ = config_of("dq", spec, device, choices)
    programs = ceil_div(spec.queries, config.block_m) * spec.batch * spec.heads
    splits = few.dq_splits(spec, device, config, programs)
    order = order_of(spec) if splits == 1 else "tile"
    l2_group = l2_group_of(order, config, device)
    step = Step("dq", config, programs * splits, order, splits, own, products_of("dq", spec, device), l2_group=l2_group)
    return (step, *sum_rows_steps(spec, splits)) if "dq" in own else (step,)


def packed_step(
    kernel: str, spec: AttentionSpec, device: DeviceFacts, config: TileConfig, of_keys: bool = False, gives: tuple[str, ...] = ()
) -> Step:
    """One of these kernels on packed sequences, whose programs own a tile of one, of queries and a head or of keys and a key head."""
    rows, block = (spec.keys, config.block_n) if of_keys else (spec.queries, config.block_m)
    programs = most_tiles(rows, packed_of(spec).sequences, block) * (spec.kv_heads if of_keys else spec.heads)
    return Step(kernel, config, programs, gives=gives, precision=products_of(kernel, spec, device))


def bias_sources(spec: AttentionSpec, needs: Needs) -> Sources:
    """Of gradients of biases that are needed. A pass gives one of them; where two fall out of the same, the other has its own kernel."""
    sources: Sources = {}
    for grad, need, bias in (("dbias", needs.dbias, spec.bias), ("dsecond", needs.dsecond, spec.second)):
        if need:
            assert bias is not None
            source = dbias_source(spec, bias)
            taken = any(other == source for other, _ in sources.values())
            sources[grad] = ("dbias" if taken else source, bias)
    return sources


def _from(kernel: str, sources: Sources) -> list[str]:
    """The gradients of biases that a kernel gives."""
    return [grad for grad, (source, _) in sources.items() if source == kernel]


def dbias_steps(spec: AttentionSpec, bias: BiasSpec, name: str, device: DeviceFacts, choices: Choices) -> list[Step]:
    """One program per tile of the bias's own shape; where those are too few to fill the chip, the loop over broadcast dims is split."""
    config, _ = config_of("dbias", spec, device, choices)
    outer, inner, head, query, key = bias.varies
    tiles_m, tiles_n = ceil_div(spec.queries, config.block_m), ceil_div(spec.keys, config.block_n)
    sizes = ((spec.batch_outer, outer), (spec.batch_inner, inner), (spec.heads, head), (tiles_m, query), (tiles_n, key))
    own = looped = 1
    for size, varies in sizes:
        if varies:
            own *= size
        else:
            looped *= size
    if looped >= 2**31:
        raise unsupported(f"the gradient of a bias broadcast over {looped} tiles", "triton", "sum a larger bias's gradient, or use 'tiled'")
    splits = max(1, min(looped, ceil_div(2 * device.sms, own)))
    step = Step("dbias", config, own * splits, splits=splits, gives=(name,), precision=products_of("dbias", spec, device))
    return [step, *dbias_sum_steps(spec, splits, bias, name)]
