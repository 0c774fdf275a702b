"""The kernel that writes new keys and values into a KV cache (``kernels/triton/append.py``): its configuration and grid.

Called by ``plan/cache.py`` and ``launch/append.py``. Pure. It has no tiles of scores and no buffers in shared memory, and runs wherever a
call on a KV cache does.
"""

from __future__ import annotations

from ...spec_cache import CacheSpec
from ..configs import TileConfig
from ..steps import Step, ceil_div

__all__ = ["CONFIG", "programs", "step"]

CONFIG = TileConfig(16, 16, 4, 1)  # a program writes block_m rows of one key head


def programs(rows: int, kv_heads: int) -> int:
    """Of a grid that writes so many rows of every key head."""
    return ceil_div(rows, CONFIG.block_m) * kv_heads


def step(spec: CacheSpec) -> Step:
    """The kernel, with its grid."""
    rows = (spec.new or 0) * (1 if spec.packed_new else spec.requests)
    return Step("append", CONFIG, programs(rows, spec.kv_heads))
