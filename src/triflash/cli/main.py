"""The commands of ``triflash``: what each takes, and its exit status. Called by ``__main__``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from .. import __version__
from ..errors import UnsupportedError
from ..plan.select import BACKENDS
from . import explain_options, extras
from .bench.options import add_arguments as add_bench_arguments
from .compile import options as compile_options
from .demo.options import Options, add_arguments
from .tune import options as tune_options

__all__ = ["main"]

_BAD_USE, _INTERRUPTED = 2, 130
_GREETING = f"""triflash {__version__}: exact fused attention for PyTorch, with any bias and its gradient
in a program    from triflash import attention; help(attention), and help(triflash.compat) for calls of SDPA, flash_attn and xformers
here            triflash demo, bench, explain, compile, tune or env; triflash --help says what each does"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 fine, 1 the command failed, 2 it was used wrongly."""
    parser = argparse.ArgumentParser(prog="triflash", description="Exact fused attention with any bias and its gradient.")
    parser.add_argument("--version", action="version", version=f"triflash {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    words = "train a small transformer with a learned position bias by triflash and by dense PyTorch attention, and compare"
    demo = commands.add_parser("demo", help=words, description=words)
    add_arguments(demo, BACKENDS)
    words = "measure speed and memory beside other implementations, on named workloads or shapes of your own, and check the results"
    bench = commands.add_parser("bench", help=words, description=words, allow_abbrev=False)
    add_bench_arguments(bench)
    words = "say what a problem runs on a device, which need not be here, and why: backend, kernels, tiles, memory"
    explain = commands.add_parser("explain", help=words, description=words, allow_abbrev=False)
    explain_options.add_arguments(explain)
    words = "compile the kernels of problems into Triton's cache, in parallel and for any GPU, so that their first calls compile nothing"
    compile_ = commands.add_parser("compile", help=words, description=words, allow_abbrev=False)
    compile_options.add_arguments(compile_)
    words = "print versions, devices and settings, for a bug report"
    env = commands.add_parser("env", help=words, description=words, allow_abbrev=False)
    env.add_argument("--check", action="store_true", help="say instead what would run here and what is missing; status 1 if something is")
    words = "time the tile configurations of a problem on this GPU and write the best to a file, which TRIFLASH_TUNED=FILE makes plans read"
    tune = commands.add_parser("tune", help=words, description=words, allow_abbrev=False)
    tune_options.add_arguments(tune)
    given = parser.parse_args(argv)
    if given.command is None:
        print(_GREETING)
        return 0
    if given.command == "bench":
        return _bench(bench, given, list(sys.argv[1:] if argv is None else argv))
    run = {
        "demo": (_demo, demo), "explain": (_explain, explain), "compile": (_compile, compile_), "env": (_env, env), "tune": (_tune, tune),
    }  # fmt: skip
    command, own = run[given.command]
    return command(own, given)


def _needs(command: str, extra: str, package: str) -> int:
    """Say what is missing, and how it is installed, in a clone of triflash and elsewhere."""
    print(f"triflash {command} needs {package}: {extras.install(extra)}", file=sys.stderr)
    return _BAD_USE


def _demo(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    try:
        from .demo import run, text
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("rich", "matplotlib", "numpy"):
            raise
        return _needs("demo", "demo", error.name)
    try:
        options = Options.of(given, torch.cuda.is_available())
        text.load(text.read(given.text), options.seq_len)
        return run.run(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED


def _bench(parser: argparse.ArgumentParser, given: argparse.Namespace, words: list[str]) -> int:
    from .bench.options import Options, listing

    if given.list:
        print(listing())
        return 0
    try:
        from .bench import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("rich", "matplotlib", "numpy"):
            raise
        return _needs("bench", "bench", error.name)
    try:
        if given.bench_command == "compare":
            return run.compare(given.before, given.after, given.effect, given.alpha, given.all)
        if given.bench_command == "plot":
            return run.plot(given.run, given.plot_out, given.picture)
        return run.run(Options.of(given, torch.cuda.is_available(), words))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED


def _explain(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    try:
        print(explain_options.explanation(given))
    except UnsupportedError as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    return 0


def _compile(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    try:
        from .compile import problems, run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "rich":
            raise
        return _needs("compile", "bench", error.name)
    try:
        return run.run(list(problems.problems(given, compile_options.defaults(parser))), given.workers, given.cache)
    except UnsupportedError as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED


def _env(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    if given.check:
        from . import checkup

        found = list(checkup.findings())
        print(checkup.text(found))
        return int(any(finding.mark == checkup.MISSING for finding in found))
    from . import environment

    print(environment.text())
    return 0


def _tune(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    try:
        from .tune import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "rich":
            raise
        return _needs("tune", "bench", error.name)
    try:
        return run.run(tune_options.Options.of(given))
    except (ValueError, OSError, UnsupportedError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
