"""triflash: exact, fused attention for PyTorch in Triton, with any bias and its gradient.

Importing it starts no GPU and compiles nothing; Triton itself is imported with the first call that needs it.
"""

from . import vmap as _vmap  # registers torch.ops.triflash, and how vmap takes them
from .attention import attention, merge_states
from .errors import UnsupportedError
from .explainer import explain
from .launch import record_launches
from .plan.overlay import tuned
from .plan.select import backend
from .triton_flash_attention import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from .varlen import attention_varlen

__version__ = "0.1.0"

__all__ = [
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_varlen",
    "backend",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "merge_states",
    "record_launches",
    "tuned",
]
