"""Interprets the PTX that kernels write for what a warp decides by itself, for all threads of a warpgroup at once: ``gluon_twin.py`` has the
rest. Only what ``kernels/hopper/softmax.py`` uses; anything else is an error.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Registers = dict[str, Any]
WARP = 32
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "gtu": lambda a, b: ~(a <= b),
    "neu": lambda a, b: ~(a == b),
    "eq": lambda a, b: a == b,
}


def run(text: str, constraints: str, arguments: Sequence[Tensor], dtypes: Any) -> Any:
    """What the text makes of tensors of (64, groups, 4, 2), by lane: a tensor, or as many as there are dtypes."""
    single = not isinstance(dtypes, tuple)
    dtypes = (dtypes,) if single else dtypes
    operands = constraints.split(",")
    results = sum(x.startswith("=") for x in operands)
    pack = results // sum(1 if dtype.itemsize == 4 else 0.5 for dtype in dtypes)
    threads = [_by_thread(x) for x in torch.broadcast_tensors(*arguments)]
    chunks = []
    for start in range(0, threads[0].shape[1], int(pack)):
        inputs = [column for x in threads for column in _registers(x[:, start : start + int(pack)])]
        registers: Registers = dict(zip((f"${results + n}" for n in range(len(inputs))), inputs, strict=True))
        for constraint, x in zip(operands[results:], inputs, strict=True):
            if constraint.isdigit():  # an output that begins as this
                registers[f"${constraint}"] = x
        with np.errstate(all="ignore"):
            _execute(_parsed(text), registers)
        chunks.append([registers.get(f"${n}", np.zeros(4 * WARP, np.uint32)) for n in range(results)])
    outputs, at = [], 0
    for dtype in dtypes:
        count = int(pack) if dtype.itemsize == 4 else int(pack) // 2
        columns = [column for chunk in chunks for column in chunk[at : at + count]]
        outputs.append(_by_lane(torch.from_numpy(np.stack([c.view(np.uint32).view(np.int32) for c in columns], 1)).view(dtype)))
        at += count
    return outputs[0] if single else tuple(outputs)


def _by_thread(x: Tensor) -> Tensor:
    """(threads, what each holds): rows 16 a warp, two of them 8 apart a thread, whose elements go two in a row, two in the other, and so on."""
    return x.reshape(4, 2, 8, x.shape[1], 4, 2).permute(0, 2, 4, 3, 1, 5).reshape(4 * WARP, -1).contiguous()


def _by_lane(x: Tensor) -> Tensor:
    return x.view(4, 8, 4, -1, 2, 2).permute(0, 4, 1, 3, 2, 5).reshape(64, -1, 4, 2)


def _registers(x: Tensor) -> list[Any]:
    """Columns of 32 bits, two elements of 16 in each."""
    columns = x.contiguous() if x.dtype == torch.float32 else x.contiguous().view(torch.int32)
    return list(columns.numpy().T)


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> list[tuple[str, str, list[str]]]:
    """(guard, instruction, operands); a label is an instruction of its own."""
    parsed = []
    for statement in re.sub(r"\{(h\d), (h\d)\}", r"\1:\2", text.strip().removeprefix("{").removesuffix("}")).replace("\n", " ").split(";"):
        statement = statement.strip()
        if match := re.match(r"(\w+):\s*(.*)", statement):
            parsed.append(("", "label", [match[1]]))
            statement = match[2]
        if statement and not statement.startswith(".reg"):
            guard, instruction, operands = re.fullmatch(r"(?:@(!?\w+) )?(\S+) (.*)", statement).groups()  # type: ignore[union-attr]
            parsed.append((guard or "", instruction, [x.strip() for x in operands.split(",")]))
    return parsed


def _execute(statements: list[tuple[str, str, list[str]]], registers: Registers) -> None:
    active, target = np.ones(4 * WARP, bool), None
    for guard, instruction, operands in statements:
        if instruction == "label":
            assert operands[0] == target
            active, target = np.ones(4 * WARP, bool), None
        elif instruction == "bra.uni":
            assert guard.startswith("!") and target is None
            active, target = registers[guard[1:]], operands[0]
            assert (active.reshape(-1, WARP).all(1) == active.reshape(-1, WARP).any(1)).all(), "warps are said to be of one mind"
        elif active.any():
            assert not guard
            value = _value(instruction, [_read(x, registers) for x in operands[1:]])
            if ":" in operands[0]:
                low, high = operands[0].split(":")
                registers |= {low: (value & 0xFFFF).astype(np.uint16), high: (value >> 16).astype(np.uint16)}
            else:
                before = registers.get(operands[0])
                registers[operands[0]] = value if before is None or active.all() else np.where(active, value, before.view(value.dtype))


def _read(operand: str, registers: Registers) -> Any:
    if operand in registers:
        return registers[operand]
    if operand.startswith("0f"):
        return np.full(4 * WARP, int(operand[2:], 16), np.uint32).view(np.float32)
    return np.uint32(int(operand, 0))


def _value(instruction: str, x: list[Any]) -> Any:
    kind, *kinds = instruction.split(".")
    if kind == "setp":
        result = _COMPARISONS[kinds[0]](x[0].view(np.float32), x[1])
        return result | x[2] if "or" in kinds else result
    if kind == "vote":
        return np.repeat(x[0].reshape(-1, WARP).any(1), WARP)
    if kind == "shfl":
        return x[0][np.arange(4 * WARP) ^ int(x[1])]
    if kind == "selp":
        return np.where(x[2], x[0], x[1])
    if instruction == "cvt.f32.f16":
        return x[0].view(np.float16).astype(np.float32)
    if kind == "cvt":
        dtype = torch.bfloat16 if kinds[1] == "bf16x2" else torch.float16
        high, low = (
            torch.from_numpy(np.ascontiguousarray(y)).to(dtype).view(torch.int16).numpy().view(np.uint16).astype(np.uint32) for y in x
        )
        return low | high << np.uint32(16)
    if kind in ("shl", "and"):
        bits = x[0].view(np.uint32)
        return bits << x[1] if kind == "shl" else bits & x[1]
    if kind == "mov":
        return x[0].view(np.float32) if kinds == ["f32"] else x[0].view(np.uint32)
    x = [y.view(np.float32) for y in x]
    return {
        "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "max": np.fmax, "ex2": np.exp2,
        "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    }[kind](*x)  # fmt: skip
