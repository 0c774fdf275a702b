"""Faster ways that no GPU has compared with a reference yet: off, but where ``TRIFLASH_UNTRIED=1`` was set when triflash was imported.

Called by the rooms of kernels in ``plan/kernels/``. The stand-in for the GPU has run all of them (``tests/test_loops.py``,
``tests/test_mask_bounds.py``); ``docs/tuning.md`` says what each is worth. One that a GPU has compared is asked for here no more.
"""

from __future__ import annotations

import os

__all__ = ["UNTRIED"]

UNTRIED = os.environ.get("TRIFLASH_UNTRIED", "0") not in ("", "0")
