"""Tuned configurations: a file that ``triflash tune`` wrote, read by ``kernels/portable.py`` only if the user points to it.

An entry holds for one GPU, one Triton version and one state of the kernels' source. Any other entry is ignored, with one warning a file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import bad_value
from .configs import OWNERS_OF_KEYS, Problem, TileConfig
from .device import DeviceFacts, triton_version

__all__ = ["SCHEMA", "TUNABLE", "Entry", "Overlay", "active", "kernel_source", "load", "tuned", "write"]

SCHEMA = 1
TUNABLE = ("forward", *OWNERS_OF_KEYS, "dq", "dbias")
_ENVIRONMENT = "TRIFLASH_TUNED"
_WANTED = "a file that triflash tune wrote"


@functools.cache
def kernel_source() -> str:
    """A digest of the portable kernels' source, which a measured speed depends on."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent.parent / "kernels" / "triton").glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Entry:
    """The best configuration measured for ``problem`` on a GPU, with a Triton version and a digest of the kernels' source.

    measured: how it was found (shapes, milliseconds, the default's milliseconds), for people to read; nothing depends on it.
    """

    gpu: str
    arch: str
    triton: str
    kernels: str
    problem: Problem
    config: TileConfig
    measured: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def key(self) -> tuple[object, ...]:
        """What two entries may not share: a newer one takes the older one's place."""
        return (self.gpu, self.arch, self.triton, self.kernels, self.problem)

    def stale(self, device: DeviceFacts) -> str | None:
        """Why this entry does not hold here, or None if it does."""
        if (self.gpu, self.arch) != (device.name, device.arch):
            return f"measured on {self.gpu} ({self.arch}), this is {device.name or 'an unnamed GPU'} ({device.arch})"
        if self.triton != triton_version():
            return f"measured with Triton {self.triton}, this is {triton_version()}"
        if self.kernels != kernel_source():
            return f"measured with kernel source {self.kernels}, this is {kernel_source()}"
        return None


@dataclass(frozen=True, eq=False)  # compared by identity, which keeps it cheap as part of a cache's key
class Overlay:
    """The entries of one file."""

    path: str
    entries: tuple[Entry, ...]

    def lookup(self, problem: Problem, device: DeviceFacts) -> TileConfig | None:
        """The configuration of the entry that holds for the problem on this device, or None. Warns once a file of entries that do not."""
        reason = None
        for entry in self.entries:
            if entry.problem == problem:
                stale = entry.stale(device)
                if stale is None:
                    return entry.config
                reason = stale
        if reason is not None and self not in _warned:
            _warned.add(self)
            warnings.warn(f"{self.path}: tuned configurations are ignored: {reason}; run triflash tune again", stacklevel=2)
        return None


_warned: set[Overlay] = set()


def load(path: str | os.PathLike[str], argument: str = "path") -> Overlay:
    """Read and check a file. Raises ``ValueError`` naming ``argument`` and what is wrong with it."""
    try:
        status = os.stat(path)
        return _load(os.fspath(path), argument, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise bad_value(argument, _WANTED, f"{os.fspath(path)!r}: {error.strerror}") from None


@functools.lru_cache(maxsize=16)  # the same file twice is the same overlay, which keeps cached plans valid and warnings single
def _load(path: str, argument: str, modified: int, size: int) -> Overlay:
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:  # also of bytes that are not text
        raise bad_value(argument, _WANTED, f"{path!r}: {error}") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise bad_value(argument, f"{_WANTED}, schema {SCHEMA}", f"{path!r}: schema {schema}", "run triflash tune again")
    entries = content.get("entries")
    if not isinstance(entries, list):
        raise bad_value(argument, _WANTED, f"{path!r}: no list of entries")
    try:
        return Overlay(path, tuple(_entry(number, item) for number, item in enumerate(entries)))
    except ValueError as error:
        raise bad_value(argument, _WANTED, f"{path!r}: {error}") from None


def _entry(number: int, item: Any) -> Entry:
    where = f"entry {number}"
    texts = {name: _typed(where, item, name, str) for name in ("gpu", "arch", "triton", "kernels")}
    problem = Problem(**_record(f"{where} problem", _typed(where, item, "problem", dict), Problem))
    if problem.kernel not in TUNABLE:
        raise bad_value(f"{where} problem kernel", f"one of {', '.join(TUNABLE)}", repr(problem.kernel))
    config = TileConfig(**_record(f"{where} config", _typed(where, item, "config", dict), TileConfig))
    return Entry(**texts, problem=problem, config=config, measured=_typed(where, item, "measured", dict))


def _record(where: str, item: dict[str, Any], of: Any) -> dict[str, Any]:
    """The fields of a dataclass of plain values; its annotations name their types. One that a file does not have keeps its default."""
    kinds = {"str": str, "int": int, "bool": bool}
    known = [f for f in fields(of) if f.default is MISSING or (isinstance(item, dict) and f.name in item)]
    return {f.name: _typed(where, item, f.name, kinds[f.type]) for f in known}  # type: ignore[index]


def _typed(where: str, item: Any, name: str, kind: type) -> Any:
    value = item.get(name) if isinstance(item, dict) else None
    if type(value) is not kind:
        raise bad_value(f"{where} {name}", f"a JSON {kind.__name__}", repr(value))
    return value


def write(path: str | os.PathLike[str], entries: Iterable[Entry]) -> Overlay:
    """Add entries to a file, in place of older ones with the same key, and return what it now holds. Whole or not at all."""
    before = load(path).entries if os.path.exists(path) else ()
    merged = {entry.key: entry for entry in (*before, *entries)}
    lines = ",\n".join(json.dumps({**asdict(entry), "measured": dict(entry.measured)}) for entry in merged.values())
    handle, scratch = tempfile.mkstemp(dir=os.path.dirname(os.path.abspath(path)), prefix=".tuned-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(f'{{"schema": {SCHEMA},\n"entries": [\n{lines}\n]}}\n')
        os.chmod(scratch, 0o644)  # a temporary file is its owner's alone
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
    return load(path)


class _Nobody:
    """Nobody entered ``tuned``: the environment decides."""


NOBODY = _Nobody()

# Process-wide like override_configs: autograd runs the backward pass of GPU tensors on threads of its own.
chosen: Overlay | _Nobody | None = NOBODY


@contextmanager
def tuned(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Within the block, use the configurations of a file that ``triflash tune`` wrote.

    Args:
        path: the file; None uses no file, also where ``TRIFLASH_TUNED`` names one.

    It holds for passes that start within the block, on any thread. Entries measured on another GPU, with another Triton or with other
    kernels are ignored with one warning. Outside any block the environment variable ``TRIFLASH_TUNED``, read at the first call, names the
    file; without either, no file is read. Results keep the same bits from run to run, but not those of other tile sizes.

    Raises:
        ValueError: the file does not exist or is not one that ``triflash tune`` wrote.
    """
    global chosen
    overlay = None if path is None else load(path)
    before = chosen
    chosen = overlay
    try:
        yield
    finally:
        chosen = before


def active() -> Overlay | None:
    """The tuned configurations in force, or None: part of the key of plan caches."""
    return of_environment() if isinstance(chosen, _Nobody) else chosen


@functools.cache
def of_environment() -> Overlay | None:
    """Those of the file that the environment names, or None."""
    path = os.environ.get(_ENVIRONMENT)
    return load(path, _ENVIRONMENT) if path else None
