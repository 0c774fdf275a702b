"""A run as data: what is written to JSON and read back by ``plot`` and ``compare``. Every sample is kept."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .timing import quantiles
from .workloads import Workload

__all__ = ["SCHEMA", "Cell", "Row", "Run", "write_whole"]

SCHEMA = "triflash-bench/2"
_OLD_SCHEMA, _OLD_PASSES = "triflash-bench/1", {"fwd+bwd": "step", "step": "host-step"}  # and what they are called now


@dataclass
class Cell:
    """One workload of a run, with the numbers that the tables need."""

    key: str
    name: str
    workload: dict[str, Any]
    mask: str
    flops: dict[str, int]
    bytes: dict[str, int]

    @classmethod
    def of(cls, workload: Workload, passes: tuple[str, ...]) -> Cell:
        """From a workload."""
        flops, moved = ({which: count(which) for which in passes} for count in (workload.flops, workload.bytes))
        return cls(workload.key, workload.name, asdict(workload), workload.mask, flops, moved)

    def flops_of(self, row: Row) -> int:
        """Of a row of this cell."""
        return self.flops[row.which] if row.flops is None else row.flops

    def bytes_of(self, row: Row) -> int:
        """Likewise."""
        return self.bytes[row.which] if row.bytes is None else row.bytes

    @property
    def dtype(self) -> str:
        """bf16, fp16 or fp32."""
        return str(self.workload["dtype"])

    @property
    def bias(self) -> str:
        """The bias as the tables name it: ``none``, ``1hqk``, ``1hqk+db``."""
        second = f"/{self.workload['second']}" if self.workload.get("second") else ""
        return (self.workload["bias"] or "none") + second + ("+db" if self.workload["dbias"] else "")


@dataclass
class Row:
    """What one provider did in one pass of one cell.

    status: ``ok``, ``dash`` (cannot, see ``reason``) or ``WRONG`` (the gate's words in ``reason``). samples_ms: every sample, in order.
    peak_bytes: above inputs and outputs, of the passes that time the device. ran: which kernels triflash started, or nothing.
    flops, bytes: of a provider that computes something simpler than the cell's workload; None: the cell's. breakdown: of a ``host-step``,
    if it was asked for: see :mod:`triflash.cli.bench.breakdown`.
    """

    cell: str
    provider: str
    which: str
    status: str = "dash"
    reason: str = ""
    samples_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    ran: list[str] = field(default_factory=list)
    flops: int | None = None
    bytes: int | None = None
    breakdown: dict[str, Any] = field(default_factory=dict)

    @property
    def median_ms(self) -> float:
        """Milliseconds."""
        return quantiles(self.samples_ms)["p50"]


@dataclass
class Run:
    """All of it. complete: False while it runs, and in what an interrupted run left."""

    machine: dict[str, Any]
    options: dict[str, Any]
    ceilings: dict[str, dict[str, Any]] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    complete: bool = False

    def __post_init__(self) -> None:
        self._found: dict[tuple[str, str, str], Row] = {}

    def row(self, cell: Cell, provider: str, which: str) -> Row | None:
        """The row of a provider and pass, if there is one."""
        if len(self._found) != len(self.rows):
            self._found = {(row.cell, row.provider, row.which): row for row in self.rows}
        return self._found.get((cell.key, provider, which))

    @property
    def providers(self) -> list[str]:
        """In the order in which they were asked for."""
        return list(dict.fromkeys(row.provider for row in self.rows))

    @property
    def passes(self) -> list[str]:
        """In the order in which they were asked for."""
        return list(dict.fromkeys(row.which for row in self.rows))

    def rate(self, cell: Cell, row: Row) -> float | None:
        """FLOP/s at the median; None where there is no time."""
        return 1e3 * cell.flops_of(row) / row.median_ms if row.status == "ok" else None

    def of_ceiling(self, cell: Cell, row: Row) -> dict[str, float]:
        """Shares of the two ceilings, ``matmul`` and ``copy``, and ``best``, that of the one which binds."""
        if row.status != "ok":
            return {}
        shares = {}
        seconds = row.median_ms / 1e3
        matmul, copy = self.ceilings.get(f"matmul {cell.dtype}"), self.ceilings.get("copy")
        if matmul:
            shares["matmul"] = cell.flops_of(row) / seconds / matmul["flops_per_second"]
        if copy:
            shares["copy"] = cell.bytes_of(row) / seconds / copy["bytes_per_second"]
        return {**shares, "best": max(shares.values())} if shares else {}

    def dump(self) -> str:
        """As JSON."""
        return json.dumps({"schema": SCHEMA, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read a file that :meth:`dump` made. Raises ValueError if it is none, OSError if it cannot be read."""
        try:
            found = json.loads(path.read_text())
            schema = found.pop("schema")
        except (ValueError, AttributeError, KeyError, TypeError):
            raise ValueError(f"{path}: wanted a file of triflash bench, got something else") from None
        if schema not in (SCHEMA, _OLD_SCHEMA):
            raise ValueError(f"{path}: wanted schema {SCHEMA}, got {schema}")
        try:
            if schema == _OLD_SCHEMA:
                _renew(found)
            cells, rows = [Cell(**c) for c in found.pop("cells")], [Row(**r) for r in found.pop("rows")]
            return cls(**found, cells=cells, rows=rows)
        except (KeyError, TypeError):
            raise ValueError(f"{path}: wanted a whole file of triflash bench, got one whose parts are missing or unknown") from None


def _renew(found: dict[str, Any]) -> None:
    """Passes of an older file by their names of today. The wall time of a step between synchronisations is dropped."""
    for cell in found["cells"]:
        for counts in (cell["flops"], cell["bytes"]):
            counts.update({_OLD_PASSES[which]: counts.pop(which) for which in list(counts) if which in _OLD_PASSES})
    for row in found["rows"]:
        row["which"] = _OLD_PASSES.get(row["which"], row["which"])
        row.pop("wall_ms", None)


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file so that nobody ever sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(part, path)
