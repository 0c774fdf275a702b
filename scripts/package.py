"""Builds what is published, and tries it as a user would: `make package`, which CI runs. No network; seconds.

python scripts/package.py             sdist, from it the wheel; their metadata and contents; the wheel in a fresh environment
python scripts/package.py --release   also what RELEASING.md wants of a release: version, date, links, a clean checkout
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
LARGEST = 1_000_000  # bytes of either file; 0.59 (wheel) and 0.48 MB on 2026-11-30
AT_ROOT = {
    "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "pyproject.toml", "setup.cfg",
}  # fmt: skip
CALL = """
import pathlib, sys, torch, triflash
assert pathlib.Path(triflash.__file__).is_relative_to(sys.prefix), triflash.__file__
q, k, v = (torch.randn(2, 9, 3, 8, requires_grad=True) for _ in range(3))
bias = torch.randn(3, 9, 9, requires_grad=True)
out = triflash.attention(q, k, v, bias=bias, causal=True)
out.sum().backward()
s = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5 + bias
dense = torch.einsum("bhij,bjhd->bihd", s.masked_fill(torch.ones(9, 9).triu(1) > 0, -torch.inf).softmax(-1), v)
torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-4)
assert bias.grad.shape == bias.shape and triflash.nn.RelativeBias(3)(9).shape == (1, 3, 9, 9) and triflash.compat.sdpa
print("a call from the wheel is right")
"""


def misplaced(names: Sequence[str], wheel: bool) -> list[str]:
    """Files of an archive that do not belong into it; ``names`` of an sdist without its leading folder."""
    wrong = []
    for name in names:
        top, _, rest = name.partition("/")
        if wheel:
            fits = top.endswith(".dist-info") or (top == "triflash" and name.endswith((".py", "/py.typed")))
        else:
            fits = name in AT_ROOT or (top == "src" and (rest.startswith("triflash.egg-info/") or name.endswith((".py", "/py.typed"))))
        if not fits or "__pycache__" in name:
            wrong.append(name)
    return wrong


def unready(version: str, changelog: str, citation: str, pyproject: str) -> list[str]:
    """What a release still lacks, in words."""
    dated = re.search(rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)$", changelog, re.MULTILINE)
    urls = re.search(r"^\[project\.urls\]\n(\w.* = \"https://.*\n)+", pyproject, re.MULTILINE)
    wanted = {
        f"__version__ is {version}: take .dev off": re.fullmatch(r"\d+\.\d+\.\d+", version),
        f"CHANGELOG.md has no dated heading for {version}": dated,
        f"CITATION.cff has another version than {version}": re.search(rf"^version: {re.escape(version)}$", citation, re.MULTILINE),
        "CITATION.cff has no date-released, or another date than CHANGELOG.md": dated and f"date-released: {dated[1]}" in citation,
        "pyproject.toml has no [project.urls] with https addresses": urls,
    }  # fmt: skip
    return [words for words, there in wanted.items() if not there]


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """A command's output; its failure is this script's."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True, cwd=cwd, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def listed(path: Path) -> list[str]:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    with tarfile.open(path) as archive:
        return [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]


def tried(wheel: Path) -> None:
    """The wheel in an environment of its own, which borrows PyTorch and Triton of this one."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "fresh"
        venv.create(fresh, with_pip=False)
        python = fresh / ("Scripts" if os.name == "nt" else "bin") / "python"
        run(
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--python",
            python,
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            wheel,
        )
        site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        command = python.with_name("triflash")
        assert "usage: triflash" in run(command, "--help", cwd=fresh)
        assert len(run(command, cwd=fresh).splitlines()) == 3
        print(run(command, "--version", cwd=fresh).strip())
        print(run(python, "-c", CALL, cwd=fresh).strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", action="store_true", help="also hold it to RELEASING.md")
    release = parser.parse_args().release
    for old in DIST.glob("triflash-*"):
        old.unlink()
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST)
    built = sorted(DIST.glob("triflash-*"))
    print(run(sys.executable, "-m", "twine", "check", "--strict", *built).strip())
    problems = []
    for path in built:
        names = listed(path)
        print(f"{path.name}: {len(names)} files, {path.stat().st_size:,} bytes")
        problems += [f"{path.name} holds {name}" for name in misplaced(names, path.suffix == ".whl")]
        if path.stat().st_size > LARGEST:
            problems.append(f"{path.name} is larger than {LARGEST:,} bytes")
    (wheel,) = DIST.glob("*.whl")
    tried(wheel)
    if release:
        texts = [(ROOT / name).read_text() for name in ("CHANGELOG.md", "CITATION.cff", "pyproject.toml")]
        problems += unready(wheel.name.split("-")[1], *texts)
        if changed := run("git", "status", "--porcelain").strip():
            problems.append(f"the checkout has changes:\n{changed}")
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
