"""The backward pass on Hopper: which of its kernels run for which gradients, and what they cannot do. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import bad_value
from ..spec import AttentionSpec, BiasSpec, Needs
from . import hopper_backward as keys
from . import hopper_rows as rows
from .configs import TileConfig
from .device import DeviceFacts
from .hopper import checked
from .hopper_backward import KeysConfig
from .hopper_rows import RowsConfig
from .steps import Step, broadcast_rows, ceil_div, sum_steps

__all__ = ["EDGE", "FLAGS", "adds_dq", "backward_steps", "finds_mild", "gains_by_mild", "shared_memory", "source_of", "why_not_backward"]

EDGE = TileConfig(64, 16, 4, 1)  # rows of a program of prepare and finish, which have no tiles of scores
FLAGS = 512  # which prepare sets if statistics are mild: kernels/hopper/edges.py says so


def why_not_backward(spec: AttentionSpec, needs: Needs, device: DeviceFacts) -> tuple[str, str] | None:
    """None if the kernels can give these gradients, else (what they cannot do, the nearest thing that works)."""
    if spec.bias is not None and not spec.bias.varies[4]:
        return "the backward pass with a bias that does not vary over keys", "use backend('triton')"
    if needs.dbias and _source(spec) == "dbias" and not rows.dbias_works(spec):
        return f"the gradient of a bias of shape {spec.bias}", "use backend('triton')"
    if needs.dbias and _source(spec) == "dbias" and spec.mask is not None and spec.mask.varies[3] and spec.queries > 1:
        return f"the gradient of a bias of shape {spec.bias} beside a mask of shape {spec.mask}", "use backend('triton')"
    limit = device.shared_memory
    keys_too = needs.dbias and _source(spec) == "dkdv"
    fits = keys.keys_config(spec, False, limit, keys_too) is not None and rows.dq_config(spec, limit, False) is not None
    if needs.dbias and _source(spec) == "dq":
        fits = fits and rows.dq_config(spec, limit, True) is not None
    elif needs.dbias and _source(spec) == "dbias":
        fits = fits and rows.dbias_config(spec, limit) is not None
    if not fits:
        return (
            f"the backward pass at head dims {spec.head_dim} and {spec.value_dim} with such a bias",
            "no tile fits: use backend('triton')",
        )
    return None


def _source(spec: AttentionSpec) -> str:
    """Which kernel gives the gradient of the bias, as ``steps.dbias_source``; the one for dk and dv keeps the heads of a group apart."""
    assert spec.bias is not None
    *_, query, key = spec.bias.varies
    if all(spec.bias.varies):
        return "dq"
    return "dkdv" if key and not query else "dbias"


def adds_dq(spec: AttentionSpec, needs: Needs, limit: int, always: bool = False) -> bool:
    """Whether dq is added up in global memory, in no fixed order, by the kernel that gives dk and dv.

    Not where the same bits are asked for on every run, where a kernel that owns queries runs anyway, and, unless ``always``, where that is
    faster.
    """
    if spec.deterministic or not (needs.dq and (needs.dk or needs.dv)) or max(keys.dims(spec)) > keys.NARROW:
        return False
    if needs.dbias and _source(spec) == "dq":
        return False
    return (always or _worth_adding(spec)) and keys.keys_config(spec, True, limit) is not None


def _worth_adding(spec: AttentionSpec) -> bool:
    """Whether adding up dq beats a pass of its own: so many keys are seen (H200; docs/tuning.md). The pass loads bias tiles once more."""
    widest, tiled = max(keys.dims(spec)), keys.has_bias_tiles(spec)
    if widest <= keys.APART_DIM:
        return spec.keys >= (256 if widest <= 32 or tiled else 512)
    if tiled:
        return spec.keys >= 512
    return (spec.keys if spec.lo is None and spec.hi is None else spec.keys // 3) > 768


def finds_mild(spec: AttentionSpec, steps: Sequence[Step]) -> bool:
    """Whether ``prepare`` looks if statistics are mild (``kernels/hopper/edges.py``): where a kernel is the faster for it."""
    return any(gains_by_mild(spec, step) for step in steps)


def gains_by_mild(spec: AttentionSpec, step: Step) -> bool:
    """Whether that kernel is the faster for it: beside a bias the ones for dq and for wide heads are not."""
    if not spec.keeps_rest:
        return False
    if step.kernel == "dq" or (isinstance(step.config, KeysConfig) and step.config.wide):
        return spec.bias is None or spec.bias.is_mask
    return step.kernel == "dbias" or isinstance(step.config, KeysConfig)


def backward_steps(spec: AttentionSpec, needs: Needs, device: DeviceFacts, by_hand: Mapping[str, object]) -> tuple[Step, ...]:
    """The kernels of a backward pass, in order, for what ``why_not_backward`` allows; ``by_hand``: configurations chosen for single
    kernels.
    """
    limit, processors = device.shared_memory, device.processors
    source = _source(spec) if needs.dbias else None
    order = "batch" if rows.batch_fastest(spec) else "head"
    pairs = spec.batch * spec.heads
    adding = adds_dq(spec, needs, limit, isinstance(by_hand.get("dqdkdv"), KeysConfig))
    steps = [Step("prepare", EDGE, pairs * keys.stats_length(spec) // EDGE.block_m)]
    given = (("dk", needs.dk), ("dv", needs.dv), ("dq", adding), ("dbias", source == "dkdv"))
    if gives := tuple(name for name, need in given if need):
        kernel = "dqdkdv" if adding else "dkdv"
        chosen = by_hand.get(kernel)
        usual = keys.keys_config(spec, adding, limit, source == "dkdv")
        config = chosen if isinstance(chosen, KeysConfig) else usual and _in_parts(spec, usual, processors)
        if isinstance(chosen, KeysConfig) and chosen.wide != (max(keys.dims(spec)) > keys.NARROW):
            raise bad_value("wide", f"{not chosen.wide} for head dims {spec.head_dim} and {spec.value_dim}", chosen.wide)
        if isinstance(chosen, KeysConfig) and chosen.apart and max(keys.dims(spec)) > keys.APART_DIM:
            raise bad_value("apart", f"False for head dims {spec.head_dim} and {spec.value_dim}", True, "there are no registers for it")
        if isinstance(chosen, KeysConfig) and adding and not chosen.apart and chosen.bias_stages > 1:
            raise bad_value("bias_stages", "1, or 2 with apart", chosen.bias_stages, "there are no barriers of the processor for more")
        assert config is not None, "why_not_backward refuses what fits no candidate"
        if config.head_splits > spec.groups:
            raise bad_value("head_splits", f"at most {spec.groups}, the query heads of a key head", config.head_splits)
        programs = min(keys.keys_tiles(spec, config)[1], processors)
        steps.append(Step(kernel, config, programs, order, _rows(spec) if source == "dkdv" else 1, gives))
        summed = tuple(name for name in ("dk", "dv") if name in gives)
        if config.head_splits > 1 and summed:  # what is summed up for a bias alone keeps the heads apart anyway
            programs = spec.batch * spec.kv_heads * ceil_div(spec.keys, EDGE.block_m)
            steps.append(Step("dkdv_sum", EDGE, programs, splits=config.head_splits, gives=summed))
    if (needs.dq and not adding) or source == "dq":
        gives = ("dq",) * needs.dq + ("dbias",) * (source == "dq")
        chosen = by_hand.get("dq")
        config_q = chosen if isinstance(chosen, RowsConfig) else rows.dq_config(spec, limit, source == "dq", processors)
        if isinstance(chosen, RowsConfig):
            checked(chosen, spec.head_dim, rows.dq_shared_memory(spec, chosen, source == "dq"), limit)
        assert config_q is not None, "why_not_backward refuses what fits no candidate"
        steps.append(Step("dq", config_q, rows.dq_programs(spec, config_q, processors), order, gives=gives))
    if adding:
        steps.append(Step("finish", EDGE, pairs * ceil_div(spec.queries, EDGE.block_m), gives=("dq",)))
    if source == "dbias":
        chosen = by_hand.get("dbias")
        config_b = chosen if isinstance(chosen, RowsConfig) else rows.dbias_config(spec, limit)
        if isinstance(chosen, RowsConfig):
            checked(chosen, 0, rows.dbias_shared_memory(spec, chosen), limit)
        assert config_b is not None, "why_not_backward refuses what fits no candidate"
        own, rounds = rows.dbias_tiles(spec, config_b)[2], rows.dbias_rounds(spec)
        splits = max(1, min(rounds, ceil_div(processors * config_b.together, own)))
        steps.append(Step("dbias", config_b, rows.dbias_programs(spec, config_b, splits, processors), order, splits, ("dbias",)))
        steps += sum_steps(spec, _bias(spec), splits)
    elif source == "dkdv":
        steps += sum_steps(spec, _bias(spec), _rows(spec))
    return tuple(steps)


def _bias(spec: AttentionSpec) -> BiasSpec:
    assert spec.bias is not None
    return spec.bias


def _rows(spec: AttentionSpec) -> int:
    return broadcast_rows(spec, _bias(spec))


def _in_parts(spec: AttentionSpec, config: KeysConfig, processors: int) -> KeysConfig:
    """The configuration with as many parts of a key head as pay."""
    return replace(config, head_splits=keys.head_splits(spec, config, processors))


def shared_memory(spec: AttentionSpec, step: Step) -> int | None:
    """What a program of a backward step takes at most, in bytes, if it is a matter of its configuration."""
    if isinstance(step.config, KeysConfig):
        return keys.shared_memory(spec, step.config, "dq" in step.gives, "dbias" in step.gives)
    if isinstance(step.config, RowsConfig):
        if step.kernel == "dbias":
            return rows.dbias_shared_memory(spec, step.config)
        return rows.dq_shared_memory(spec, step.config, "dbias" in step.gives)
    return None


def source_of(step: Step, by_hand: Mapping[str, object]) -> str:
    """Where the configuration of a backward step that has tiles of scores comes from."""
    if by_hand.get(step.kernel) == step.config:
        return "chosen by hand (override_configs)"
    return f"the first candidate that fits, of plan/{'hopper_backward' if isinstance(step.config, KeysConfig) else 'hopper_rows'}.py"
