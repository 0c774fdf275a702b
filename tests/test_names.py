"""The field's names, checked: what things used to be called is found nowhere in the source, the tests and the scripts.

A reader of FlashAttention-3, CUTLASS or PyTorch looks for the names on the right. Strings and comments are not looked at.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Container, Iterator
from pathlib import Path

import pytest

import triflash

ROOT = Path(triflash.__file__).parent
HERE = Path(__file__).parent
ROOMS = ("kernels/*/*.py", "plan/*.py", "plan/kernels/*.py", "launch/hopper*.py")

NAMES = {  # old: new
    "processor": "sm", "processors": "sms", "product": "mma", "products_fit": "mma_fits", "PRODUCT_REGISTERS": "MMA_REGISTERS",
    "turns": "ping_pong", "together": "ctas_per_sm", "apart": "dq_warpgroup", "direct": "red_dq", "ahead": "deferred",
    "own_out": "separate_o (of dq: separate_dq)", "add_up": "add_dq_by_tma", "add_up_apart": "run_dq_warpgroup", "add_to_sum": "red_add_dq",
    "dq_product": "dq_mma", "dq_hand_over": "hand_dq_to_tma",
    "mild": "small_lse", "mildest": "all_lse_small", "MILD": "SMALL_LSE", "MILDEST": "SMALL_LSE_LIMIT", "finds_mild": "flags_small_lse",
    "gains_by_mild": "reads_small_lse",
    "settled": "rescaled", "shrunk": "rescaled_accumulator", "squashed": "tanh", "capped": "softcapped", "slope_at": "tanh_slope",
    "weighed": "p_and_ds_factor",
    "hide": "mask_scores", "hide_by": "mask_by_tile", "hide_unseen": "mask_band", "clear_hidden": "clear_masked",
    "keep_up_to": "select_le", "shown": "mask_tile, mask_row, mask_column", "first_shown": "first_mask", "next_shown": "next_mask",
    "section": "l2_group", "sections": "groups", "snake": "serpentine", "L2_SECTION": "L2_GROUP_BYTES", "dealt": "best_order",
    "busiest": "load_imbalance", "UNEVENNESS": "MAX_LOAD_IMBALANCE", "NEAR": "PREFERRED_GROUP_BYTES", "equal_sections": "equal_groups",
    "whole_tiles": "query_tiles", "keys_tiles": "key_tiles",
    "signal": "bar_arrive", "meet": "bar_sync",
    "edges": "preprocess, postprocess", "prepare": "preprocess", "finish": "postprocess", "EDGE": "ROWWISE",
    "wide": "d256", "keys_backward": "dkdv", "wide_keys_backward": "dkdv_d256", "keys_call": "dkdv_call",
    "stream": "philox", "stream_of": "philox_of", "drawn": "keep_bits", "dropped": "drop", "signed": "sign_dropped", "of_scores": "ds_of",
    "KeysConfig": "DkdvConfig", "RowsConfig": "DqConfig, DbiasConfig",
    "value_stages": "v_stages, query_slots",
}  # fmt: skip
FILES = {  # old: new
    "kernels/hopper/backward.py": "kernels/hopper/dkdv.py", "kernels/hopper/keys_loads.py": "kernels/hopper/dkdv.py",
    "kernels/hopper/keys_block.py": "kernels/hopper/dkdv_step.py", "kernels/hopper/keys_dq.py": "kernels/hopper/dkdv_step.py",
    "kernels/hopper/wide.py": "kernels/hopper/dkdv_d256.py", "kernels/hopper/edges.py": "kernels/hopper/preprocess.py",
    "kernels/hopper/columns.py": "kernels/hopper/scores_kq.py", "kernels/hopper/rows.py": "kernels/hopper/scores_qk.py",
    "kernels/hopper/loads.py": "kernels/hopper/forward_loads.py", "launch/hopper_rows.py": "launch/hopper_dq.py",
    "plan/hopper_backward.py": "plan/kernels/dkdv.py", "plan/hopper_rows.py": "plan/kernels/dq.py", "plan/hopper_steps.py": "plan/hopper.py",
}  # fmt: skip


ELSEWHERE = {  # words that outside of ROOMS have a meaning of their own
    "ahead": "launch/ahead.py, which compiles ahead of time", "apart": "at a distance", "drawn": "of random numbers", "dropped": "left out",
    "finish": "to end", "prepare": "to get ready", "processor": "platform.processor", "product": "itertools.product",
    "section": "of a page", "settled": "decided", "shown": "on a page", "shrunk": "of workloads", "signal": "Python's module",
    "stream": "of CUDA", "wide": "of 64 bits, or columns",
}  # fmt: skip


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that a module defines or uses, with its line; strings are none."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            yield node.id, line
        elif isinstance(node, ast.Attribute):
            yield node.attr, line
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg:
            yield node.arg, line
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, line
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).rpartition(".")[2], line
            yield node.name.rpartition(".")[2], line


def old_names(text: str, names: Container[str] = NAMES) -> list[tuple[str, int]]:
    return sorted({(name, line) for name, line in identifiers(ast.parse(text)) if name in names})


@pytest.mark.parametrize("path", sorted({path for room in ROOMS for path in ROOT.glob(room)}), ids=lambda path: str(path.relative_to(ROOT)))
def test_old_names_are_gone(path: Path) -> None:
    assert [f"{path.name}:{line}: {name}, now {NAMES[name]}" for name, line in old_names(path.read_text())] == []


@pytest.mark.parametrize("folder", [ROOT, HERE, HERE.parent / "scripts"], ids=lambda path: path.name)
def test_old_names_are_gone_elsewhere(folder: Path) -> None:
    names = NAMES.keys() - ELSEWHERE.keys()
    found = {str(path.relative_to(folder)): old_names(path.read_text(), names) for path in sorted(folder.rglob("*.py"))}
    assert len(found) > 10 and {path: each for path, each in found.items() if each} == {}


def test_pages_do_not_quote_old_names() -> None:
    """What stands between backticks, in pages about the present."""
    pages = [*(HERE.parent / "docs").glob("*.md"), HERE.parent / "README.md", HERE.parent / "CONTRIBUTING.md"]
    quoted = {(page.name, text) for page in pages for text in re.findall(r"`([^`\n]+)`", page.read_text())}
    names = NAMES.keys() - ELSEWHERE.keys()
    assert len(quoted) > 1000 and [each for each in sorted(quoted) if names & set(re.findall(r"\w+", each[1]))] == []


def test_old_files_are_gone_and_new_ones_there() -> None:
    assert [old for old in FILES if (ROOT / old).exists()] == [] == [new for new in FILES.values() if not (ROOT / new).exists()]


@pytest.mark.parametrize(
    "text", ["turns = 1", "f(apart=True)", "def hide(s): ...", "x.mild", "from .rings import meet", "def f(shown): ..."]
)
def test_old_names_would_be_found(text: str) -> None:
    assert len(old_names(text)) == 1 and old_names(f"{text!r}") == []
