"""The passes on Hopper: which kernels run for which gradients, and what none of them can do. Called by ``select.py`` and explain. Pure."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..spec import AttentionSpec, Needs
from . import hopper_packed
from .choices import Choices
from .configs import MAX_HEAD_DIM
from .device import DeviceFacts
from .kernels import dbias, dkdv, dq, few, forward, mask_bounds, rowwise, short
from .kernels.loops import by_loops, reads_small_lse
from .kernels.parts import dbias_sum_steps
from .kernels.shared import ROWS, HopperConfig, is_banded, span
from .packed import dbias_steps
from .steps import Step, broadcast_rows

__all__ = [
    "LARGEST_SOFTCAP", "adds_dq", "backward_steps", "flags_small_lse", "forward_steps", "reads_small_lse", "reservation",
    "shared_memory", "tile_first", "why_not", "why_not_backward",
]  # fmt: skip

SHORTEST = 64  # queries of a tile, most of which fewer leave empty; up to so many keys nobody measured them (H200, tuning.md)
SPLIT_QUERIES = few.MAX_QUERIES  # up to so many, on few.MIN_KEYS keys and more, backend triton's kernels split keys over SMs
SPARSE = 16  # queries of a packed sequence, in the mean; those of 34 were worth it
LARGEST_SOFTCAP = 500.0  # a score's rounding error is up to 8e-7 of the cap; 16-bit results would show that of a larger one


def reservation(spec: AttentionSpec, device: DeviceFacts, backward: bool = False) -> str | None:
    """Why the automatic choice does not take these kernels for a pass although they can run it, or None if it does."""
    if spec.head_dim % 8 or spec.value_dim % 8:
        return "would copy tensors whose rows are no multiple of 16 bytes"
    if spec.packed is not None:
        if hopper_packed.like(spec).queries < SPARSE:
            return f"has tiles of 64 queries, of which sequences of fewer than {SPARSE} leave most empty"
        return None
    if short.takes_backward(spec, device) if backward else short.takes(spec, device):
        return "the kernels of backend triton for short rows are faster here"
    if backward and few.takes_backward(spec, device):
        return "the kernel of backend triton for few queries is faster here"
    many_keys = spec.keys >= few.MIN_KEYS
    if many_keys and spec.queries <= SPLIT_QUERIES and not (backward and _fills_sms(spec, device)):
        return f"has no kernel that splits {few.MIN_KEYS} keys and more over SMs for up to {SPLIT_QUERIES} queries"
    if (spec.queries < SHORTEST and not (many_keys and backward and spec.groups == 1)) or spec.keys <= SHORTEST:
        return f"is known to be faster only from {SHORTEST} queries and with more than {SHORTEST} keys"
    return None


def _fills_sms(spec: AttentionSpec, device: DeviceFacts) -> bool:
    """Whether a backward pass for all gradients has work for all SMs where queries are few: keys are dealt out, but to a kernel that gives
    dq alone, if there is one, queries.
    """
    adding = adds_dq(spec, Needs(True, True, True, spec.bias is not None), device.shared_memory)
    return adding or spec.batch * spec.heads * -(-spec.queries // (2 * ROWS)) >= device.sms


def tile_first(spec: AttentionSpec) -> AttentionSpec:
    """The spec as the kernels take it: of two biases first the one that varies over queries. Gradients keep their names."""
    if spec.second is None or spec.bias is None or spec.bias.varies[3] or not spec.second.varies[3]:
        return spec
    return replace(spec, bias=spec.second, second=spec.bias)


def _why_not_two(spec: AttentionSpec) -> tuple[str, str] | None:
    """What the kernels cannot do with two biases, of which they take a tile and beside it a row."""
    tile, row = spec.bias, spec.second
    if tile is None or row is None:
        return None
    if not (tile.varies[3] and tile.varies[4] and row.varies[4]) or row.varies[3]:
        which = "two biases other than one over queries and keys and one over keys alone"
        return which, "use backend('triton')"
    return ("a float64 bias", "cast the bias to float32, or use backend('tiled')") if row.dtype == "fp64" else None


@functools.lru_cache(maxsize=1024)  # a backward pass asks again
def why_not(spec: AttentionSpec, device: DeviceFacts) -> tuple[str, str] | None:
    """None if the forward kernel can run the spec, else (what it cannot do, the nearest thing that works)."""
    spec = tile_first(spec)
    if spec.dropout_place == "any":
        return "dropout of a part that begins at no multiple of 16 rows and keys of the whole", "use backend('triton')"
    if spec.packed is not None and (reason := hopper_packed.why_not(spec)):
        return reason
    if reason := _why_not_two(spec):
        return reason
    if spec.placed or spec.diagonal or (spec.shift is not None and spec.packed is None):
        return f"{_places(spec)}", "it has no kernels for them yet: use backend('triton')"
    if device.arch != "sm90":
        return f"{device.arch}", "its kernels are made for sm90 (H100, H200, H20): use backend('triton')"
    if spec.dtype not in ("fp16", "bf16"):
        return f"{spec.dtype}", "its products are 16-bit ones: use backend('triton')"
    if spec.softcap > LARGEST_SOFTCAP:
        return f"a soft cap of {spec.softcap:g}", f"above {LARGEST_SOFTCAP:g} its kernels round scores too far: use backend('triton')"
    if spec.bias is not None and spec.bias.dtype == "fp64":
        return "a float64 bias", "cast the bias to float32, or use backend('tiled')"
    if spec.mask is not None and not (spec.bias is not None and spec.bias.varies[4] and spec.mask.varies[4]):
        return "a mask beside a bias of which one does not vary over keys", "use backend('triton')"
    if max(spec.head_dim, spec.value_dim) > MAX_HEAD_DIM:
        return f"head dim {max(spec.head_dim, spec.value_dim)}", f"its limit is {MAX_HEAD_DIM}; backend('tiled') takes any"
    if spec.is_empty:
        return "empty tensors", "use backend('triton')"
    # What has no element has no memory, and no descriptor.
    if spec.no_sequences and (spec.alibi or spec.bias is not None):
        return f"{'ALiBi slopes' if spec.alibi else 'a bias or mask'} of no sequences", "use backend('triton')"
    if spec.packed is not None and 0 in (spec.packed.most_queries, spec.packed.most_keys):
        return "a bias or mask of no queries or no keys", "use backend('triton')"
    return forward.why_not(spec if spec.packed is None else hopper_packed.like(spec), device)


def _places(spec: AttentionSpec) -> str:
    """What it is of starts, lengths and a diagonal that the kernels do not know."""
    names = ("query_starts", "query_lengths", "key_starts", "diagonal")
    given = [name + " of tensors" * (name == "diagonal") for name in names if getattr(spec, name)]
    return ", ".join(given) or "alibi_slopes beside a diagonal other than the number of keys less that of queries"


def why_not_backward(spec: AttentionSpec, needs: Needs, device: DeviceFacts) -> tuple[str, str] | None:
    """None if the kernels can give these gradients of a spec that ``why_not`` allows, else (what they cannot do, what works)."""
    if spec.packed is not None:
        spec, needs = hopper_packed.like(spec), replace(needs, dbias=False)  # which has portable kernels
    spec, needs = _in_order(spec, needs)
    if spec.bias is not None and not spec.bias.varies[4]:
        return "the backward pass with a bias that does not vary over keys", "use backend('triton')"
    alone = needs.dbias and dbias.owns_dbias(spec)
    if alone and (reason := dbias.why_not(spec, device)):
        return reason
    limit = device.shared_memory
    fits = dkdv.choose(spec, limit, _sum_of_keys(spec, needs)) is not None
    fits = fits and dq.choose(spec, limit, ("dq", "dbias") if needs.dbias and dq.owns_dbias(spec) else ("dq",)) is not None
    if not fits or (alone and dbias.choose(spec, limit) is None):
        sizes = f"head dims {spec.head_dim} and {spec.value_dim}"
        return f"the backward pass at {sizes} with such a bias", "no tile fits: use backend('triton')"
    return None


def forward_steps(spec: AttentionSpec, device: DeviceFacts, by_hand: Mapping[str, object]) -> tuple[Step, ...]:
    """The kernels of a forward pass. by_hand: configurations chosen for single kernels."""
    if spec.packed is not None:
        return hopper_packed.forward_steps(spec, device, by_hand)
    own = tile_first(spec)
    return (*mask_bounds.steps(own, by_hand, ("queries",)), forward.step(own, device, by_hand))


def _in_order(spec: AttentionSpec, needs: Needs) -> tuple[AttentionSpec, Needs]:
    """``tile_first``, and the gradients that are needed, in that order."""
    own = tile_first(spec)
    return (own, needs) if own is spec else (own, replace(needs, dbias=needs.dsecond, dsecond=needs.dbias))


def _sum_of_keys(spec: AttentionSpec, needs: Needs) -> tuple[str, ...]:
    """The gradient of a bias over keys alone, if it is needed."""
    row = dkdv.row_of_keys(spec)
    return (row[0],) if row is not None and getattr(needs, row[0]) else ()


def backward_steps(spec: AttentionSpec, needs: Needs, device: DeviceFacts, choices: Choices) -> tuple[Step, ...]:
    """The kernels of a backward pass, in order, for what ``why_not_backward`` allows."""
    by_hand = dict(choices.by_hand)
    if spec.packed is not None:
        alike = hopper_packed.like(spec)
        given = replace(needs, dbias=False)
        adding = adds_dq(alike, given, device.shared_memory, dkdv.sums_dq_by_hand(by_hand))
        packed_steps = _by_loops(alike, hopper_packed.backward_steps(spec, needs, device, by_hand, adding), device)
        portable = needs.dbias and not dbias.takes_packed(spec, device)
        return (*packed_steps, *dbias_steps(spec, device, choices)) if portable else packed_steps
    own, needed = _in_order(spec, needs)
    steps = _by_loops(own, _backward_steps(own, needed, device, by_hand), device)
    if spec.alibi:
        keys = forward.config_of(own, device, by_hand).block_n
        steps = tuple(replace(step, forward_keys=keys) if step.kernel in ("dkdv", "dqdkdv", "dq") else step for step in steps)
    if own is spec:
        return steps
    return tuple(replace(step, gives=_renamed(step.gives)) for step in steps)


def _by_loops(spec: AttentionSpec, steps: Sequence[Step], device: DeviceFacts) -> tuple[Step, ...]:
    return tuple(each for step in steps for each in by_loops(spec, step, device))


def _renamed(gives: tuple[str, ...]) -> tuple[str, ...]:
    """With the gradients of two biases in the other order."""
    names = {"dbias": "dsecond", "dsecond": "dbias"}
    return tuple(names.get(name, name) for name in gives)


def _backward_steps(spec: AttentionSpec, needs: Needs, device: DeviceFacts, by_hand: Mapping[str, object]) -> tuple[Step, ...]:
    by_keys, by_queries = _sum_of_keys(spec, needs), needs.dbias and dq.owns_dbias(spec)
    both = ("dk",) * needs.dk + ("dv",) * needs.dv + ("dq",)
    pairs = dkdv.of_pairs(spec, device, by_hand, (*both, *by_keys)) if _may_give_dq(spec, needs) else None
    adding = pairs is not None or adds_dq(spec, needs, device.shared_memory, dkdv.sums_dq_by_hand(by_hand))
    steps = [rowwise.preprocess_step(spec)]
    wanted = (("dk", needs.dk), ("dv", needs.dv), ("dq", adding))
    if gives := (*(name for name, need in wanted if need), *by_keys):
        own = dkdv.step(spec, device, by_hand, gives, pairs)
        steps.append(own)
        assert isinstance(own.config, dkdv.DkdvConfig)
        summed = tuple(name for name in ("dk", "dv") if name in gives)
        if own.config.head_splits > 1 and summed:  # sums for a bias alone keep the heads apart anyway
            steps.append(rowwise.dkdv_sum_step(spec, own.config.head_splits, summed))
    alone = (needs.dq and not adding) or by_queries
    if alone:
        steps.append(dq.step(spec, device, by_hand, ("dq",) * needs.dq + ("dbias",) * by_queries))
    if adding and pairs is None:
        steps.append(rowwise.postprocess_step(spec))
    if needs.dbias and dbias.owns_dbias(spec):
        steps += dbias.steps(spec, device, by_hand)
    row = dkdv.row_of_keys(spec)
    if by_keys and row is not None:
        steps += dbias_sum_steps(spec, broadcast_rows(spec, row[1]), row[1], row[0])
    # A kernel that writes the gradient of every score's bias visits all blocks.
    tables = ("queries",) * (alone and not by_queries) + ("keys",) * bool(gives)
    return (*mask_bounds.steps(spec, by_hand, tables), *steps)


def adds_dq(spec: AttentionSpec, needs: Needs, limit: int, always: bool = False) -> bool:
    """Whether dq is summed in global memory, in no fixed order, by the kernel that gives dk and dv.

    Not where the same bits are asked for on every run, and, unless ``always``, where a kernel that owns queries is faster.
    """
    if spec.deterministic or not _may_give_dq(spec, needs):
        return False
    return (always or _worth_adding(spec)) and dkdv.choose(spec, limit, ("dq",)) is not None


def _may_give_dq(spec: AttentionSpec, needs: Needs) -> bool:
    """Whether the kernel for dk and dv could give dq too: not where a kernel that owns queries runs anyway."""
    both = needs.dq and (needs.dk or needs.dv) and max(dkdv.dims(spec)) <= dkdv.NARROW
    return both and not (needs.dbias and dq.owns_dbias(spec))


def _worth_adding(spec: AttentionSpec) -> bool:
    """Whether summing dq beats a pass of its own, by the keys that are seen (H200; docs/tuning.md). The pass loads bias tiles once more.

    ==============================  ======================  ===============
    head dim                        without bias tiles      with bias tiles
    ==============================  ======================  ===============
    up to 32                        256 keys                256 keys
    up to 64                        512 keys                256 keys
    up to 128                       769 keys (a band: 3 x)  512 keys
    ==============================  ======================  ===============

    At head dims above 64, without bias tiles, nor where a window shows a query 1,024 keys at most.
    """
    widest, tiled = max(dkdv.dims(spec)), dkdv.has_bias_tiles(spec)
    if widest <= dkdv.DQ_WARPGROUP_DIM:
        return spec.keys >= (256 if widest <= 32 or tiled else 512)
    if tiled:
        return spec.keys >= 512
    if is_banded(spec):
        return spec.keys // 3 > 768 and span(spec) > 1024
    return spec.keys > 768


def flags_small_lse(spec: AttentionSpec, steps: Sequence[Step]) -> bool:
    """Whether ``preprocess`` looks if every lse is small: where a kernel is the faster for it."""
    return any(reads_small_lse(spec, step) for step in steps)


def shared_memory(spec: AttentionSpec, step: Step) -> int:
    """Bytes that a program of a step takes, at most."""
    assert isinstance(step.config, HopperConfig)
    own = tile_first(spec)
    return step.config.shared_memory(own, step.gives if own is spec else _renamed(step.gives))
