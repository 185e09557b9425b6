"""Where a run's numbers go beside its own files: TensorBoard always, wandb and trackio where tracking.report_to names them.

Each tracker is told the same: the run's name, its config without secrets, and the same values under the same names. Each
works in a thread of its own and is waited for only so long: whatever fails or hangs there becomes one warning, and the
training goes on without that tracker.
"""

import os
import queue
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scripts.utils import console, event_log, hparams, stamp
from scripts.utils.errors import MachineError

OPEN_SECONDS = 60.0  # wandb starts a process of its own, trackio imports half a web server
LOG_SECONDS = 15.0
FINISH_SECONDS = 60.0


@dataclass(frozen=True)
class Record:
    """What every tracker is told of a run. ``key`` is the same at each start of the run: by it a record goes on.

    ``config``: the resolved config, in sections, without secrets; ``text`` is the same as YAML.
    """

    run: str
    folder: Path
    key: str
    project: str
    config: dict[str, Any]
    text: str
    data: str


@dataclass(frozen=True)
class Tracker:
    """An open record: ``log`` takes values by name and the step they belong to."""

    log: Callable[[Mapping[str, float], int], None]
    finish: Callable[[], None]


class Guarded:
    """A tracker in a thread of its own; from its first failure on it is left out."""

    def __init__(self, name: str, opener: Callable[[], Tracker], seconds: float = OPEN_SECONDS) -> None:
        self.name, self.failed = name, False
        self._tracker: Tracker | None = None
        self._work: queue.SimpleQueue[tuple[Callable[[], None], threading.Event, list[BaseException]]] = (
            queue.SimpleQueue()
        )
        # all of a tracker's calls come from one thread, as trackio wants it; a daemon, so that no hang outlives the run
        threading.Thread(target=self._serve, name=f"tracker {name}", daemon=True).start()

        def open_it() -> None:
            self._tracker = opener()

        self._wait(open_it, seconds)

    def log(self, values: Mapping[str, float], step: int, seconds: float = LOG_SECONDS) -> None:
        if self._tracker and not self.failed:
            self._wait(partial(self._tracker.log, dict(values), step), seconds)

    def finish(self, seconds: float = FINISH_SECONDS) -> None:
        if self._tracker and not self.failed:
            self._wait(self._tracker.finish, seconds)
        self._tracker = None

    def _serve(self) -> None:
        while True:
            work, done, problems = self._work.get()
            try:
                work()
            except BaseException as problem:  # also SystemExit: no tracker may end the run
                problems.append(problem)
            done.set()

    def _wait(self, work: Callable[[], None], seconds: float) -> None:
        done, problems = threading.Event(), list[BaseException]()
        self._work.put((work, done, problems))
        if not done.wait(seconds):
            self._give_up(f"it did not answer within {seconds:.0f} s")
        elif problems:
            said = str(stamp.without_secrets(str(problems[0]))).strip().splitlines()
            self._give_up(f"{type(problems[0]).__name__}: {said[0][:300]}" if said else type(problems[0]).__name__)

    def _give_up(self, reason: str) -> None:
        self.failed = True
        console.warn(f"{self.name} records nothing more of this run ({reason}); the run goes on without it")


def names_of(report_to: Sequence[str]) -> list[str]:
    """The trackers that tracking.report_to asks for; TensorBoard is among them unless the list is empty."""
    return ["tensorboard", *(name for name in report_to if name != "tensorboard")] if report_to else []


def check_installed(report_to: Sequence[str]) -> None:
    """Raise ``MachineError`` for a tracker that was asked for and is not installed: known before the training, not after it."""
    for name in report_to:
        if find_spec(name) is None:
            extra = "FORCE=1" if name == "tensorboard" else f"EXTRAS={name}"  # that one is in the base install
            raise MachineError(f"tracking.report_to: {name} is not installed", f"make install {extra}, or take it out")


def record_of(facts: Mapping[str, Any], config: Mapping[str, Any], project: str) -> Record:
    """What the trackers are told: ``facts`` is the run's stamp, ``config`` its resolved config in sections."""
    run, clean = facts["run"], stamp.without_secrets(dict(config))
    began = str((facts.get("starts") or [{}])[0].get("at", "")).replace(":", "").replace("-", "")
    text = hparams.as_text(clean)
    key = f"{run}-{began}" if began else run
    project = os.environ.get("WANDB_PROJECT") or project
    return Record(run, stamp.run_folder(run).absolute(), key, project, clean, text, facts["data"]["name"])


def open_all(names: Sequence[str], record: Record) -> list[Guarded]:
    return [Guarded(name, partial(_OPEN[name], record)) for name in names]


def add_later(facts: Mapping[str, Any], config: Mapping[str, Any], values: Mapping[str, float], step: int) -> None:
    """Add values to the records of a run that has ended, where trackers other than TensorBoard hold one."""
    tracking = config.get("tracking") or {}
    names = [name for name in tracking.get("report_to") or () if name in ("wandb", "trackio") and find_spec(name)]
    record = record_of(facts, config, tracking.get("project") or "sft-play")
    for tracker in open_all(names, record):
        tracker.log(values, step)
        tracker.finish()


def by_group(logs: Mapping[str, Any]) -> dict[str, float]:
    """The loop's own names as the trackers group them: loss → train/loss, eval_loss → eval/loss."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": float(value)
        for name, value in logs.items()
        if isinstance(value, int | float)
    }


def open_tensorboard(record: Record) -> Tracker:
    events = event_log.EventFile(record.folder / "tensorboard")
    events.hparams(record.run, hparams.of_config(record.config, record.data))
    events.text("config", record.text)
    return Tracker(events.scalars, events.close)


def open_wandb(record: Record) -> Tracker:
    """A wandb run, on the disk only where no key and no WANDB_MODE say otherwise: it would ask for a key, and wait."""
    import wandb

    _try_to_write(record.folder / "wandb")  # it would go to the system's temporary folder instead
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
    settings = wandb.Settings(
        silent=True,
        console="off",  # what is printed stays here
        disable_code=True,
        disable_git=True,
        x_disable_meta=True,  # host, user, e-mail and command line
        x_disable_machine_info=True,
        host="",
        x_disable_stats=True,
        x_save_requirements=False,
        init_timeout=OPEN_SECONDS / 2,
        finish_timeout=FINISH_SECONDS / 2,
    )
    run = wandb.init(
        project=record.project, name=record.run, id=record.key, resume="allow", dir=str(record.folder), mode=mode,
        config=record.config, settings=settings,
    )  # fmt: skip
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step")
    if mode == "offline":
        console.note("wandb", f"recorded in {_shown(record.folder / 'wandb')}; wandb sync uploads it")
    return Tracker(lambda values, step: run.log({**values, "train/global_step": step}), run.finish)


def _has_wandb_key() -> bool:
    """In the environment, or where ``wandb login`` keeps it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    from wandb.sdk.lib.wbauth import HostUrl, read_netrc_auth

    host = HostUrl(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    return read_netrc_auth(host=host) is not None


def open_trackio(record: Record) -> Tracker:
    """A trackio run in outputs/.trackio (TRACKIO_DIR wins); its config is kept from its first start on."""
    # it reads this when it is imported
    place = Path(os.environ.setdefault("TRACKIO_DIR", str(record.folder.parent / ".trackio")))
    _try_to_write(place)  # it would warn at each step and go on
    import trackio
    import trackio.run
    import trackio.utils

    for module in (trackio, trackio.run, trackio.utils):  # it says nine lines on stdout, which is for results
        vars(module)["print"] = lambda *_, **__: None
    # a record on this machine needs no name of a user, for which it would ask the hub
    vars(trackio.run)["_get_default_namespace"] = lambda: None
    run = trackio.init(
        project=record.project, name=record.run, config=record.config, resume="allow", embed=False,
        auto_log_gpu=False, auto_log_cpu=False,
    )  # fmt: skip
    console.note("trackio", f"recorded in {_shown(place)}; to look at it: TRACKIO_DIR={_shown(place)} trackio show")
    return Tracker(lambda values, step: run.log(dict(values), step=step), trackio.finish)


def _shown(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _try_to_write(folder: Path) -> None:
    """Raise ``OSError`` where nothing can be written into ``folder``, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


_OPEN: dict[str, Callable[[Record], Tracker]] = {
    "tensorboard": open_tensorboard,
    "wandb": open_wandb,
    "trackio": open_trackio,
}
