"""What commands need beyond PyTorch, and how it is installed: in a clone of triflash by its extra, elsewhere by name."""

from __future__ import annotations

from pathlib import Path

__all__ = ["EXTRAS", "install"]

EXTRAS = {"demo": ("rich>=13", "matplotlib>=3.9.2"), "bench": ("rich>=13", "matplotlib>=3.9.2"), "hf": ("transformers>=5.20",)}
_ROOT = Path(__file__).parents[3]  # of a clone; of an installed package some folder of Python's


def install(extra: str, root: Path = _ROOT) -> str:
    """The command for the shell. A clone's is for its own folder, and says so where the shell is elsewhere."""
    if not (root / "pyproject.toml").is_file() or not (root / "src" / "triflash").is_dir():
        return "pip install " + " ".join(f"'{requirement}'" for requirement in EXTRAS[extra])
    return f"pip install '.[{extra}]'" + ("" if root == Path.cwd() else ", in the clone of triflash")
