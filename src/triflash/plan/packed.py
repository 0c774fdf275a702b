"""Which portable kernels run for packed sequences: the tables that come first, as many programs as there can be tiles, and who gives dbias.

Called by ``select.py``. The host does not know the sequences, only how many there are and how many rows in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..errors import unsupported
from ..spec import AttentionSpec, BiasSpec, Needs, Packed
from .configs import TileConfig
from .steps import SUM_BLOCK, Step, ceil_div, sum_steps

__all__ = ["ROWS_A_PROGRAM", "backward_steps", "dbias_source", "dbias_steps", "forward_steps", "most_tiles"]

ROWS_A_PROGRAM = 128  # of the kernels that fill tables, and zeros where no sequence is
_TABLES = TileConfig(128, 16, 4, 1)

Config = Callable[[str], TileConfig]


def most_tiles(rows: int, sequences: int, block: int) -> int:
    """How many tiles of so many rows sequences can have that share ``rows`` between them."""
    return rows // block + min(sequences, rows)


def _fitted(config: TileConfig, spec: AttentionSpec, of_keys: bool) -> TileConfig:
    """A configuration with no more rows a tile than most sequences have, as far as the host can tell, but 16 at least."""
    packed = _packed(spec)
    rows, longest = (spec.keys, packed.longest_k) if of_keys else (spec.queries, packed.longest_q)
    typical = max(ceil_div(rows, max(packed.sequences, 1)), 1)
    if longest is not None:
        typical = min(typical, max(longest, 1))
    field = "block_n" if of_keys else "block_m"
    while getattr(config, field) > 16 and getattr(config, field) >= 2 * typical:
        smaller = getattr(config, field) // 2
        warps = max(config.num_warps // 2, 4) if smaller < 64 else config.num_warps
        config = replace(config, **{field: smaller}, num_warps=warps)
    return config


def _packed(spec: AttentionSpec) -> Packed:
    assert spec.packed is not None
    return spec.packed


def _table_steps(spec: AttentionSpec, block_m: int | None, block_n: int | None) -> list[Step]:
    """A table of the sequences, and one of their tiles of so many queries, of so many keys; None: of none."""
    steps = [Step("extents", TileConfig(block_m or 16, block_n or 16, 4, 1), 1)]
    for name, rows, block in (("queries", spec.queries, block_m), ("keys", spec.keys, block_n)):
        if block is not None:
            programs = ceil_div(most_tiles(rows, _packed(spec).sequences, block), ROWS_A_PROGRAM)
            steps.append(Step("tiles", steps[0].config, programs, gives=(f"tiles of {name}",)))
    return steps


def _unowned(length: int, gives: tuple[str, ...]) -> Step:
    return Step("unowned", _TABLES, ceil_div(length, ROWS_A_PROGRAM), gives=gives)


def forward_steps(spec: AttentionSpec, config: Config) -> tuple[Step, ...]:
    """The kernels of a forward pass."""
    if 0 in (spec.queries, spec.heads):
        return ()
    own = _fitted(config("forward"), spec, of_keys=False)
    bound = most_tiles(spec.queries, _packed(spec).sequences, own.block_m)
    steps = _table_steps(spec, own.block_m, None)
    return (*steps, Step("forward", own, bound * spec.heads), _unowned(spec.queries, ("out", "lse")))


def dbias_source(spec: AttentionSpec, bias: BiasSpec) -> str:
    """Which kernel gives the gradient of a bias: a pass that meets each of its elements once, or one of its own, as of dense batches."""
    sequence, _, head, query, key = bias.varies
    if not (sequence and head and key):
        return "packed_dbias"
    return "dq" if query else "dkdv" if spec.groups == 1 else "packed_dbias"


def backward_steps(spec: AttentionSpec, needs: Needs, config: Config, sms: int) -> tuple[Step, ...]:
    """The kernels of a backward pass: only those that the gradients asked for need."""
    packed = _packed(spec)
    sources: dict[str, tuple[str, BiasSpec]] = {}
    for name, need, bias in (("dbias", needs.dbias, spec.bias), ("dsecond", needs.dsecond, spec.second)):
        if need:
            assert bias is not None
            source = dbias_source(spec, bias)
            sources[name] = ("packed_dbias" if any(other == source for other, _ in sources.values()) else source, bias)
    by_keys, by_queries = _fitted(config("dkdv"), spec, of_keys=True), _fitted(config("dq"), spec, of_keys=False)
    shared = config("dbias") if any(source == "packed_dbias" for source, _ in sources.values()) else None
    # One size of tile for all that own some of the queries, and one for all that own some of the keys.
    if shared is not None and packed.bias_layout == "rows":
        block = min(by_queries.block_m, shared.block_m)
        by_queries, shared = replace(by_queries, block_m=block), replace(shared, block_m=block)
    elif shared is not None and packed.bias_layout == "keys":
        block = min(by_keys.block_n, shared.block_n)
        by_keys, shared = replace(by_keys, block_n=block), replace(shared, block_n=block)
    steps, block_m, block_n = [], None, None
    if needs.dq or needs.dk or needs.dsink or sources:
        own = config("delta")
        programs = ceil_div(spec.queries, own.block_m) * spec.heads
        steps.append(Step("delta", own, programs, gives=("dsink",) if needs.dsink else ()))
    steps += [_cleared(spec, name, bias) for name, (_, bias) in sources.items()]

    def wanted(kernel: str, *grads: tuple[str, bool]) -> tuple[str, ...]:
        return (*(name for name, need in grads if need), *(name for name, (source, _) in sources.items() if source == kernel))

    if gives := wanted("dkdv", ("dk", needs.dk), ("dv", needs.dv)):
        block_n = by_keys.block_n
        steps.append(Step("dkdv", by_keys, most_tiles(spec.keys, packed.sequences, block_n) * spec.kv_heads, gives=gives))
        if given := tuple(name for name in gives if name in ("dk", "dv")):
            steps.append(_unowned(spec.keys, given))
    if gives := wanted("dq", ("dq", needs.dq)):
        block_m = by_queries.block_m
        steps.append(Step("dq", by_queries, most_tiles(spec.queries, packed.sequences, block_m) * spec.heads, gives=gives))
        if needs.dq:
            steps.append(_unowned(spec.queries, ("dq",)))
    if shared is not None:
        if packed.bias_layout == "rows":
            block_m = shared.block_m
        elif packed.bias_layout == "keys":
            block_n = shared.block_n
        for name, (source, bias) in sources.items():
            if source == "packed_dbias":
                steps += _dbias_steps(spec, bias, name, shared, sms)
    return (*_table_steps(spec, block_m, block_n), *steps)


def _sizes(spec: AttentionSpec, name: str) -> tuple[int, int]:
    """Queries and keys that a bias has for each sequence."""
    return _packed(spec).second_sizes if name == "dsecond" else _packed(spec).bias_sizes


def _elements(spec: AttentionSpec, name: str, bias: BiasSpec) -> int:
    """Of a bias, in the shape given."""
    packed, (bias_rows, bias_cols) = _packed(spec), _sizes(spec, name)
    heads = spec.heads if bias.varies[2] else 1
    if packed.bias_layout == "keys":
        return heads * spec.keys
    if packed.bias_layout == "rows":
        return heads * spec.queries * bias_cols
    return heads * (packed.sequences if bias.varies[0] else 1) * bias_rows * bias_cols


def _cleared(spec: AttentionSpec, name: str, bias: BiasSpec) -> Step:
    return Step("cleared", _TABLES, ceil_div(_elements(spec, name, bias), SUM_BLOCK), gives=(name,))


def dbias_steps(spec: AttentionSpec, config: TileConfig, sms: int) -> tuple[Step, ...]:
    """The gradient of a bias by a kernel of its own, with tables of its own, whichever kernels give those of q, k and v."""
    assert spec.bias is not None
    layout = _packed(spec).bias_layout
    extents, *tiles = _table_steps(spec, config.block_m if layout == "rows" else None, config.block_n if layout == "keys" else None)
    own = (replace(extents, gives=("dbias",)), *tiles, _cleared(spec, "dbias", spec.bias))
    return (*own, *_dbias_steps(spec, spec.bias, "dbias", config, sms))


def _dbias_steps(spec: AttentionSpec, bias: BiasSpec, name: str, config: TileConfig, sms: int) -> list[Step]:
    """One program for each tile of the bias's own shape; where all sequences share it and tiles are few, the sequences are split."""
    packed, (bias_rows, bias_cols) = _packed(spec), _sizes(spec, name)
    sequence, _, head, query, key = bias.varies
    programs = spec.heads if head else 1
    if packed.bias_layout == "rows":
        programs *= most_tiles(spec.queries, packed.sequences, config.block_m) * (ceil_div(bias_cols, config.block_n) if key else 1)
    elif packed.bias_layout == "keys":
        programs *= most_tiles(spec.keys, packed.sequences, config.block_n)
    else:
        programs *= packed.sequences if sequence else 1
        programs *= (ceil_div(bias_rows, config.block_m) if query else 1) * (ceil_div(bias_cols, config.block_n) if key else 1)
    splits = 1 if sequence else max(1, min(packed.sequences, ceil_div(2 * sms, max(programs, 1))))
    if programs * splits >= 2**31:
        raise unsupported(f"the gradient of a bias of {programs} tiles", "triton", "use 'tiled'")
    steps = [Step("packed_dbias", config, programs * splits, splits=splits, gives=(name,))]
    return [*steps, *sum_steps(spec, splits, bias, name, _elements(spec, name, bias))]
