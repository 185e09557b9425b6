"""The frame of every step: parse → config → environment → work → exit code.

A script says ``raise SystemExit(command.run(parser, work))``; this file holds the flags that all share, reads the
variables that make hands over (``SFT_CONFIG``, ``SFT_SET``, ``SFT_RUN``, …), and is the only place that turns an
exception into an exit code.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from scripts.utils import console, environment, ranks, stop_signals
from scripts.utils.errors import MachineError, SFTError
from scripts.utils.files import REPO_ROOT

if TYPE_CHECKING:
    from scripts.utils.schema import Config

Work = Callable[[argparse.Namespace, "Config"], int | None]

_DEFAULT = "configs/run_bnb.yaml"
# flags that stand for a config key, and the make variable (SFT_…) that hands the same value over
_KEY_FLAGS = {
    "run": ("run.name", "SFT_RUN"),
    "raw": ("data.raw", "SFT_RAW"),
    "model": ("model.name", "SFT_MODEL"),
    "backend": ("tuning.backend", "SFT_BACKEND"),
    "split": ("eval.split", "SFT_SPLIT"),
    "limit": ("eval.limit", "SFT_LIMIT"),
    "style": ("style.text", "SFT_STYLE"),
    "style_mode": ("style.mode", "SFT_STYLE_MODE"),
}


def from_make(name: str) -> str | None:
    """A make variable that reached this process as ``SFT_<NAME>``; empty counts as not given."""
    return os.environ.get(f"SFT_{name}") or None


def truthy(value: str | None) -> bool:
    return (value or "").lower() not in ("", "0", "no", "false")


def new_parser(
    name: str, description: str, examples: Sequence[str], *, keys: Sequence[str] = (), of_run: bool = False
) -> argparse.ArgumentParser:
    """A parser with --config, --set, and the config-key flags in ``keys``; ``examples`` end the help text.

    ``of_run``: the step works on a run that is there, whose own config counts where no other is named.
    """
    parser = argparse.ArgumentParser(
        prog=f"sft-{name}",
        description=description,
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    given = from_make("CONFIG")
    default = given if of_run else given or _DEFAULT
    shown = given or (f"that of the run, else {_DEFAULT}" if of_run else _DEFAULT)
    parser.add_argument("--config", default=default, metavar="FILE", help=f"run config (now {shown})")
    parser.add_argument(
        "--set", default=from_make("SET") or "", metavar="WORDS", help="overrides: 'section.key=value …'"
    )
    helps = {
        "run": "run name (default: <config>-<data>)",
        "raw": "raw data: a file, a folder, a pattern or hub:owner/name",
        "model": "hub id, local folder or embedded/smollm2-135m-instruct",
        "backend": "bitsandbytes or unsloth",
        "split": "train, val or test",
        "limit": "at most this many rows",
        "style": "system message to add",
        "style_mode": "prepend, append, replace or only-if-missing",
    }
    for key in keys:
        parser.add_argument(f"--{key.replace('_', '-')}", default=None, metavar=key.upper(), help=helps[key])
    return parser


def add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--force", action="store_true", default=truthy(from_make("FORCE")), help="run again even if up to date"
    )


def run(parser: argparse.ArgumentParser, work: Work, argv: Sequence[str] | None = None) -> int:
    """Parse, load the config, prepare the environment, do the work, and return the exit code."""
    arguments = parser.parse_args(argv)

    def start() -> int | None:
        environment.prepare(REPO_ROOT)
        if argv is None:
            environment.serve_one_command()
        from scripts.utils.config import load_config

        flags: dict[str, Any] = {}
        for flag, (key, variable) in _KEY_FLAGS.items():
            if hasattr(arguments, flag):
                given = getattr(arguments, flag)
                flags[key] = given if given is not None else os.environ.get(variable) or None
        config = arguments.config or _own_config(flags.get("run.name")) or _DEFAULT
        return work(arguments, load_config(config, arguments.set, flags))

    return guard(parser.prog, start)


def _own_config(run: str | None) -> str | None:
    """The file in which train wrote down the config of this run."""
    if not run:
        return None
    from scripts.utils import stamp

    path = stamp.run_folder(run) / "config.yaml"
    return str(path) if path.is_file() else None


def guard(name: str, start: Callable[[], int | None]) -> int:
    """Run ``start``; turn the project's errors, signals and a full disk into one message and an exit code."""
    console.prepare_streams()
    code: int
    told = False  # a rank's launcher says it, once for all of them

    def tell(message: str, hint: str, code: int, lost: bool = False) -> int:
        nonlocal told
        told = ranks.report(message, hint, code, lost=lost)
        if not told:
            console.error(message, hint)
        return code

    try:
        with stop_signals.raised():
            code = start() or 0
    except SFTError as problem:
        code = tell(problem.message, problem.hint, problem.exit_code, isinstance(problem, ranks.LostPeer))
    except KeyboardInterrupt:
        code = tell("interrupted", "run the same command again to go on", 130)
    except stop_signals.Terminated:
        code = tell("terminated", "run the same command again to go on", 143)
    except BrokenPipeError:
        # the reader of our output went away (`| head`); Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except MemoryError:
        code = tell("out of memory", "lower train.batch_size or render.max_length", MachineError.exit_code)
    if code and not told:
        console.exit_code(name, code)
    return code
