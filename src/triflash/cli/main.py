"""The commands of ``triflash``: what each takes, and its exit status. Called by ``__main__``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import torch

from .. import __version__
from ..errors import UnsupportedError
from ..plan.select import BACKENDS
from . import extras

__all__ = ["main"]

_BAD_USE, _INTERRUPTED, _PIPE = 2, 130, 141
_GREETING = f"""triflash {__version__}: exact fused attention for PyTorch, with any bias and its gradient
in a program    from triflash import attention; help(attention), and help(triflash.compat) for calls of SDPA, flash_attn and xformers
here            triflash demo, bench, explain, compile, tune or env; triflash --help says what each does"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 fine, 1 the command failed, 2 it was used wrongly."""
    parser = argparse.ArgumentParser(prog="triflash", description="Exact fused attention with any bias and its gradient.")
    parser.add_argument("--version", action="version", version=f"triflash {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    said = list(sys.argv[1:] if argv is None else argv)
    asked = next((word for word in said if not word.startswith("-")), None)
    own = {}
    for name, (words, add, _) in _COMMANDS.items():
        own[name] = commands.add_parser(name, help=words, description=words, allow_abbrev=name == "demo")
        if name == asked:  # the options of the others, and what these import, are nobody's business
            add(own[name])
    given = parser.parse_args(said)
    if given.command is None:
        print(_GREETING)
        return 0
    given.words = said
    try:
        status = _COMMANDS[given.command][2](own[given.command], given)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads, as head does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE


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
    from .demo.options import Options

    try:
        options = Options.of(given, torch.cuda.is_available())
        text.load(text.read(given.text), options.seq_len)
        return run.run(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED


def _bench(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
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
        return run.run(Options.of(given, torch.cuda.is_available(), given.words))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED


def _explain(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    from . import explain_options

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
    from .compile.options import defaults

    try:
        return run.run(list(problems.problems(given, defaults(parser))), given.workers, given.cache)
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
    from .tune.options import Options

    try:
        return run.run(Options.of(given))
    except (ValueError, OSError, UnsupportedError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED


def _add_demo(parser: argparse.ArgumentParser) -> None:
    from .demo.options import add_arguments

    add_arguments(parser, BACKENDS)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from .bench.options import add_arguments

    add_arguments(parser)


def _add_explain(parser: argparse.ArgumentParser) -> None:
    from .explain_options import add_arguments

    add_arguments(parser)


def _add_compile(parser: argparse.ArgumentParser) -> None:
    from .compile.options import add_arguments

    add_arguments(parser)


def _add_env(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check", action="store_true", help="say instead what would run here and what is missing; status 1 if something is"
    )


def _add_tune(parser: argparse.ArgumentParser) -> None:
    from .tune.options import add_arguments

    add_arguments(parser)


_Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.ArgumentParser, argparse.Namespace], int]]
_COMMANDS: dict[str, _Command] = {  # what it does, its options, how it is run
    "demo": (
        "train a small transformer with a learned position bias by triflash and by dense PyTorch attention, and compare", _add_demo, _demo,
    ),
    "bench": (
        "measure speed and memory beside other implementations, on named workloads or shapes of your own, and check the results",
        _add_bench, _bench,
    ),
    "explain": (
        "say what a problem runs on a device, which need not be here, and why: backend, kernels, tiles, memory", _add_explain, _explain,
    ),
    "compile": (
        "compile the kernels of problems into Triton's cache, in parallel and for any GPU, so that their first calls compile nothing",
        _add_compile, _compile,
    ),
    "env": ("print versions, devices and settings, for a bug report", _add_env, _env),
    "tune": (
        "time the tile configurations of a problem on this GPU and write the best to a file, which TRIFLASH_TUNED=FILE makes plans read",
        _add_tune, _tune,
    ),
}  # fmt: skip
