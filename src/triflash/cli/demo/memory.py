"""How much memory a piece of work took at its peak. Used by the demo's training processes and by scripts/peak_memory.py."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

__all__ = ["Memory"]


class Memory:
    """The peak of memory from here on: what PyTorch allocated on a GPU, on a CPU how far the process grew beyond its size now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again from here
        self.before = self._resident("VmRSS")

    def peak(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return self._resident("VmHWM") - self.before

    def _resident(self, field: str) -> int:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            import resource  # macOS has no /proc, Windows neither this

            size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return size if sys.platform == "darwin" else size * 1024
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
