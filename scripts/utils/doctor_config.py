"""The doctor on the config: schema, the files it names, precision and memory on this device, backend, trackers, the run.

Imports nothing heavy: what torch and transformers say of this machine comes from a trial in a child process.
"""

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.utils import (
    backend_choice,
    chat,
    checkpoints,
    files,
    hardware,
    model_store,
    planning,
    sharding,
    stamp,
    trackers,
    unsloth_probe,
)
from scripts.utils.config import run_name
from scripts.utils.errors import MachineError, RefusedError, SFTError
from scripts.utils.findings import USER, Finding, fault, from_problem, ok, warning
from scripts.utils.hardware import Hardware

if TYPE_CHECKING:
    from scripts.utils.schema import Config


def named_files(config: "Config") -> Iterator[Finding]:
    """Files and folders that the config names, but for the data and the model, which have lines of their own."""
    template = config.render.template
    if Path(template).suffix and not Path(template).is_file():
        text = f"render.template names {Path(template).absolute()}, which is not there"
        known = ", ".join(sorted(path.stem for path in chat.TEMPLATES.glob("*.jinja")))
        yield fault("config", "file-missing", text, f'SET="render.template=auto", or one of {known}', USER)
    schema = config.infer.json_schema
    if schema and not Path(schema).is_file():
        text = f"infer.json_schema names {Path(schema).absolute()}, which is not there"
        yield fault("config", "file-missing", text, 'mend the path, or SET="infer.json_schema=null"', USER)
    if (init := config.tuning.init_adapter) and not any(
        (folder / "adapter_config.json").is_file() for folder in (Path(init).expanduser(), Path("adapters") / init)
    ):
        text = f"tuning.init_adapter: {init!r} is neither a run with an adapter nor an adapter's folder"
        yield fault("config", "file-missing", text, "name a finished run (ls adapters), or the adapter's folder", USER)


def tracking(config: "Config") -> Iterator[Finding]:
    """Trackers that are asked for and cannot be had; TensorBoard is among the packages, which have lines of their own."""
    for name in [name for name in config.tracking.report_to if name != "tensorboard"]:
        try:
            trackers.check_installed([name])
        except MachineError as problem:
            yield from_problem("trackers", "tracker-missing", problem)


def engine(config: "Config") -> Iterator[Finding]:
    """What lets several processes work together, where it is a package of its own."""
    try:
        sharding.require_installed(config)
    except MachineError as problem:
        yield from_problem("config", "engine-missing", problem)


def precision(config: "Config", machine: Hardware) -> Iterator[Finding]:
    """What the run will compute in, and whether that is what was asked for."""
    try:
        choice = hardware.choose_precision(config, machine)
        optimizer = hardware.optimizer_name(config, machine)
    except MachineError as problem:
        yield from_problem("precision", "precision-refused", problem)
        return
    text = f"{choice.actual} ({choice.why}); optimizer {optimizer}"
    if choice.changed:
        text = f"{choice.requested} was asked for, {choice.actual} will be: {choice.why}"
        yield warning(
            "precision", "precision-changed", text, 'SET="train.precision=auto train.bf16=null train.fp16=null"'
        )
    else:
        yield ok("precision", text)
    if config.tuning.mode == "qlora" and machine.device == "mps":
        text = "4-bit layers (tuning.mode: qlora) need bitsandbytes, which has none for Apple GPUs"
        yield fault("precision", "no-four-bits", text, f'SET="tuning.mode=lora" (LoRA in {choice.actual})')


def plan(config: "Config", machine: Hardware) -> Iterator[Finding]:
    """Predicted memory against the machine's (or that of GPU_GB)."""
    folder = Path(config.model.name).expanduser()
    if not (folder / "config.json").is_file():
        found = model_store.present(config.model.name, config.model.revision)
        if found is None:
            yield ok("plan", f"known once {config.model.name} is on this disk (make plan fetches only its config)")
            return
        folder = found
    with contextlib.suppress(MachineError):  # said by ``precision``
        choice = hardware.choose_precision(config, machine)
        made, why = planning.resolve(config, folder, machine, choice.actual, config.tuning.backend)[1:]
        if made is None:
            yield ok("plan", f"none: {why}")
        elif made.fits:
            yield ok("plan", f"{made.verdict()}; {made.choices()}")
        else:
            steps = planning.remedies(made)
            words = " ".join(words for words, _, _ in steps)
            enough = bool(steps) and steps[-1][2].fits
            hint = (
                f'SET="{words}" (make plan shows each)'
                if enough
                else "take a smaller model, or a larger card; make plan shows why"
            )
            yield fault("plan", "memory-too-small", made.verdict(), hint)


def unsloth(config: "Config", machine: Hardware) -> Generator[Finding, None, bool]:
    """What Unsloth's own trial says, where the config asks for it (train's memory of it is renewed); returns whether
    bitsandbytes will run."""
    if config.tuning.backend != "unsloth":
        return True
    model = model_store.present(config.model.name, config.model.revision)
    if model is None:
        text = f"Unsloth can be tried once {config.model.name} is on this disk"
        yield warning("backend", "unsloth-untried", text, "make download-model")
        return False
    found = unsloth_probe.verdict(config, model, fresh=True)
    if found.works:
        slow = "; on a CPU it is no faster than bitsandbytes" if machine.device == "cpu" else ""
        how = f"attention {found.attention or 'of its choice'}, xformers {found.xformers}"
        yield ok("backend", f"unsloth: {found.tried} works in {found.precision}{slow}; {how}")
        return False
    never, remedy = config.tuning.fallback == "never", backend_choice.remedy(found)
    text = f"Unsloth was asked for, but {found.reason}; {'nothing' if never else 'bitsandbytes'} will run"
    if never:
        yield fault("backend", "unsloth-fails", text, f"{remedy}; or tuning.fallback: auto")
    else:
        yield warning("backend", "unsloth-fails", text, remedy)
    return not never


def run(config: "Config", path: str) -> Finding:
    """What the run of this config is: new, to be resumed, finished, or going on in another process."""
    try:
        name = run_name(config, path)
    except SFTError as problem:
        return from_problem("run", "run-name", problem)
    folder = stamp.run_folder(name)
    if (folder / ".lock").exists():
        try:
            with files.file_lock(folder / ".lock", wait_seconds=0, what=f"run {name!r}"):
                pass
        except RefusedError as problem:
            return warning("run", "run-in-use", problem.message, "wait until it ends, or take another name: RUN=…")
        except MachineError as problem:
            return from_problem("run", "read-only", problem)
    try:
        known = stamp.read(name)
    except RefusedError as problem:
        return from_problem("run", "stamp-damaged", problem)
    if not isinstance(known, dict):
        return ok("run", f"{name}: new")
    saved = checkpoints.listed(folder)
    if known.get("status") == "finished":
        return ok("run", f"{name}: finished; make train would train nothing more (another: RUN={name}-2)")
    return ok("run", f"{name}: " + (f"goes on from {saved[0].name}" if saved else "begun, nothing saved yet"))


def attention(config: "Config", actual: str) -> Finding:
    """Which attention transformers takes for this model."""
    wanted = config.model.attention
    why = "what transformers takes for this model" if wanted == "auto" else f"model.attention is {wanted}"
    return ok("backend", f"bitsandbytes, {config.tuning.mode}, attention {actual}: {why}")


def summary(path: str, config: "Config") -> Finding:
    words = f"{config.model.name}, {config.tuning.mode} with {config.tuning.backend}"
    return ok("config", f"{path}: {words}; rows of up to {config.render.max_length:,} tokens")
