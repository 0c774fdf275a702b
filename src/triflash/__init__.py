"""triflash: exact, fused attention for PyTorch in Triton, with any bias and its gradient.

Importing it starts no GPU and compiles nothing; Triton itself is imported with the first call that needs it, ``triflash.compat`` and
``triflash.nn`` where they are named first.
"""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

from . import vmap as _vmap  # registers torch.ops.triflash, and how vmap takes them
from .attention import attention, merge_states
from .errors import UnsupportedError
from .explainer import explain
from .kvcache import attention_with_kvcache
from .launch import record_launches
from .plan.overlay import tuned
from .plan.select import backend
from .triton_flash_attention import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from .varlen import attention_varlen

if _TYPE_CHECKING:
    from . import compat as compat
    from . import distributed as distributed
    from . import nn as nn

__version__ = "0.2.0.dev0"

__all__ = [
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "backend",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "merge_states",
    "record_launches",
    "tuned",
]

_LATER = ("compat", "distributed", "nn")


def __getattr__(name: str) -> object:
    if name in _LATER:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
