"""Other packages' attention calls, computed by triflash: one module for each package. Nothing here is imported until it is asked for.

``triflash.compat.sdpa``          ``torch.nn.functional.scaled_dot_product_attention``
``triflash.compat.torch_varlen``  ``torch.nn.attention.varlen.varlen_attn``
``triflash.compat.flash_attn``    FlashAttention-2's Python functions
``triflash.compat.xformers``      ``xformers.ops.memory_efficient_attention``
``triflash.compat.evoformer``     DeepSpeed4Science's ``DS4Sci_EvoformerAttention``, cuEquivariance's ``triangle_attention``

docs/migration.md says what differs.
"""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from . import evoformer as evoformer
    from . import flash_attn as flash_attn
    from . import sdpa as sdpa
    from . import torch_varlen as torch_varlen
    from . import xformers as xformers

__all__ = ["evoformer", "flash_attn", "sdpa", "torch_varlen", "xformers"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
