"""Is this machine ready for the config? Machine, packages, device, hub, config, data: each line tells, and what mends it.

Exit code: 0 nothing stands in the way · 2 the config or the data does · 4 this machine does.
Works before anything is installed, and says then what is missing. What may crash or hang runs in child processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    # before the project is imported: an older Python cannot even read it
    print(
        f"error: this is Python {platform.python_version()} ({sys.executable}), 3.11 to 3.13 are supported",
        file=sys.stderr,
    )
    print("hint: install one of them, then: make install PYTHON=/path/to/it\nsft-check: exit code 4", file=sys.stderr)
    raise SystemExit(4)

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import (
    command,
    console,
    doctor_config,
    doctor_data,
    doctor_hub,
    doctor_machine,
    doctor_packages,
    doctor_trials,
    environment,
    files,
    forecast,
    model_store,
    scrubbing,
    trial,
)
from scripts.utils.config import load_config
from scripts.utils.errors import MachineError, SFTError, UserError
from scripts.utils.findings import MACHINE, Finding, from_problem, ok

if TYPE_CHECKING:
    from scripts.utils.hardware import Hardware
    from scripts.utils.schema import Config

SCHEMA_VERSION = 1
COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def findings(arguments: argparse.Namespace) -> Iterator[Finding]:
    """Every line, in order. The trials run beside one another from the start; the first lines do not wait for them."""
    missing = set(doctor_packages.missing(files.REPO_ROOT))
    config, about_config = load(arguments, missing)
    with contextlib.ExitStack() as running:

        def begin(kind: str, **question: Any) -> trial.Trial | None:
            if missing & doctor_trials.NEEDED[kind]:
                return None
            begun = trial.start(
                "scripts.utils.trial_child",
                kind,
                question={"config": config.model_dump() if config else None, **question},
            )
            running.callback(trial.stop, begun)
            return begun

        device = begin("device")
        quantised = begin("bitsandbytes") if sys.platform != "darwin" else None
        model = rows = look = None
        if config:
            model = model_store.present(config.model.name, config.model.revision)
            rows = begin("rows", model=str(model)) if model else None
            look = None if doctor_hub.why_offline() else doctor_hub.Look()
        yield from machine()
        yield from doctor_packages.check(files.REPO_ROOT)
        if "torch" not in missing:
            yield from doctor_packages.torch_build()
        found = yield from doctor_trials.device(device, arguments.seconds)
        yield from doctor_trials.bitsandbytes(quantised, arguments.seconds)
        yield from about_config
        if config:
            yield doctor_hub.model(config.model, look)
            yield doctor_hub.token()
            falls_back = yield from on_device(arguments, config, found)
            yield doctor_config.run(config, arguments.config)
            yield from doctor_data.raw(config)
            yield from doctor_data.rendered(config)
            yield from doctor_trials.rows(rows, arguments.seconds, config, falls_back)
            if not model:
                yield ok("rows", f"looked at once {config.model.name} is on this disk (make download-model)")


def load(arguments: argparse.Namespace, missing: set[str]) -> tuple[Config | None, list[Finding]]:
    """The config, and the lines about it; None where it is wrong, or where what reads it is not installed."""
    if missing & {"pydantic", "pyyaml", "huggingface-hub"}:
        return None, []
    given = {"data.raw": ("raw", "RAW"), "model.name": ("model", "MODEL"), "run.name": ("run", "RUN")}
    flags = {key: getattr(arguments, flag) or command.from_make(name) for key, (flag, name) in given.items()}
    try:
        config = load_config(arguments.config, arguments.set, flags)
    except SFTError as problem:
        return None, [from_problem("config", "config-wrong", problem)]
    named = list(doctor_config.named_files(config))
    return config, [*named, *([] if named else [doctor_config.summary(arguments.config, config)])]


def machine() -> Iterator[Finding]:
    yield doctor_machine.python()
    yield doctor_machine.system()
    yield from doctor_machine.disk()
    yield from doctor_machine.memory()
    yield from doctor_machine.limits()
    yield from doctor_machine.access()


def on_device(arguments: argparse.Namespace, config: Config, found: Hardware | None) -> Generator[Finding, None, bool]:
    """The config against the device (for the memory: against that of GPU_GB); returns whether bitsandbytes will run."""
    yield from doctor_config.tracking(config)
    yield from doctor_config.engine(config)
    if found is None:
        return True
    yield from doctor_config.precision(config, found)
    try:
        planned = forecast.imagined(arguments.gpu_gb) if arguments.gpu_gb else found
        yield from doctor_config.plan(config, planned)
    except SFTError as problem:
        yield from_problem("plan", "gpu-gb", problem)
    return (yield from doctor_config.unsloth(config, found))


def work(arguments: argparse.Namespace) -> int | None:
    environment.prepare(files.REPO_ROOT)
    began, found = time.monotonic(), []
    for finding in findings(arguments):
        found.append(finding)
        if not arguments.json:
            show(finding)
    codes = {finding.code for finding in found}
    code = MACHINE if MACHINE in codes else max(codes)  # what the machine lacks is mended first
    if arguments.json:
        console.result(as_json(arguments, found, code, time.monotonic() - began))
        return code
    counts = [sum(finding.state == state for finding in found) for state in ("error", "warning")]
    console.note("check", f"{counted(*counts)}, in {time.monotonic() - began:.0f} s")
    if code:
        words = "mend the lines that begin with error, then: make check"
        which = "this machine is" if code == MACHINE else "the config or the data is"
        raise (MachineError if code == MACHINE else UserError)(f"{which} not ready (see above)", words)
    return None


def counted(errors: int, warnings: int) -> str:
    return f"{errors} error{'' if errors == 1 else 's'}, {warnings} warning{'' if warnings == 1 else 's'}"


def show(finding: Finding) -> None:
    state = console.paint(finding.state.ljust(8), COLOURS[finding.state], sys.stdout)
    console.result(f"{state} {finding.topic.ljust(12)} {finding.text}")
    if finding.state != "ok":
        console.result(f"{'':8} {'':12} {finding.name}: {finding.hint}")


def as_json(arguments: argparse.Namespace, found: list[Finding], code: int, seconds: float) -> str:
    """For issues and machines: without secrets, and without the user's name."""
    told = {
        "schema_version": SCHEMA_VERSION,
        "exit_code": code,
        "python": platform.python_version(),
        "system": platform.platform(),
        "config": arguments.config,
        "set": arguments.set,
        "seconds": round(seconds, 1),
        "findings": [finding.as_json() for finding in found],
    }
    clean = scrubbing.clean(told, scrubbing.known_secrets(), scrubbing.known_names())
    return json.dumps(clean, indent=2, ensure_ascii=False)


def build_parser() -> argparse.ArgumentParser:
    examples = ["make check CONFIG=configs/quickstart.yaml RAW=data/sample", "make check JSON=1", "make check GPU_GB=8"]
    parser = command.new_parser("check", str(__doc__), examples, keys=["run", "raw", "model"])
    json_too = command.truthy(command.from_make("JSON"))
    parser.add_argument(
        "--json", action="store_true", default=json_too, help="one JSON object (docs/check.schema.json)"
    )
    gpu = command.from_make("GPU_GB")
    parser.add_argument(
        "--gpu-gb", default=gpu, metavar="GB", help="plan for a CUDA card of this many GiB, here or not"
    )
    parser.add_argument("--seconds", type=float, default=trial.SECONDS, help="limit of each trial (now %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return command.guard("sft-check", lambda: work(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
