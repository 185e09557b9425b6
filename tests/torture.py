"""Kill a run again and again, at random moments and at every crash point of its saves; resume it each time.

    make torture KILLS=200

A small model trains once in peace. Then the same run is killed (SIGKILL) at random moments until it was killed as
often as asked, and once more at each file operation that its saves make: opening, syncing, renaming, linking,
deleting; and the disk is full from such an operation on. After every one the run must resume, may lose only the steps after its last finished checkpoint, and must
end with the adapter of the quiet run, bit for bit. With ``signals`` it is asked to stop by SIGINT and SIGTERM instead.

Every run is a forked process of this one, which has imported everything already: a life costs one or two seconds.
"""

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIG = "tiny.yaml"
# audit events (PEP 578) of what changes files, raised just before it happens
EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.symlink", "os.link", "os.truncate", "os.chmod"}


@dataclass
class Outcome:
    kills: int = 0
    crash_points: int = 0
    full_disks: int = 0
    resumed: int = 0
    failures: list[str] = field(default_factory=list)


def prepare(folder: Path, model: Path, *, steps: int = 5, overrides: str = "") -> None:
    """Raw rows, config and rendered data for a run of ``steps`` steps that saves at each."""
    raw = folder / "data" / "raw"
    raw.mkdir(parents=True)
    lines = [{"question": f"How much is {n} plus {n + 1}?", "answer": f"It is {2 * n + 1}."} for n in range(24)]
    (raw / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    each = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 2}
    train = {
        "max_steps": steps,
        "gradient_accumulation": 1,
        "pack_length": 64,
        "learning_rate": 0.003,
        "self_test": False,
    }
    config = {
        "model": {"name": str(model)},
        "data": {"raw": "data/raw/sums.jsonl"},
        "render": {"max_length": 64},
        "tuning": {"mode": "lora"},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "train": {**train, **each, "logging_steps": 1, "precision": "fp32"},
    }
    (folder / CONFIG).write_text(json.dumps(config))


def train(run: str, folder: Path) -> int:
    """One whole `train` of ``run``, in this process; returns its exit code."""
    from scripts import process, render, train
    from scripts.utils import command
    from scripts.utils.config import load_config

    os.chdir(folder)
    config = load_config(CONFIG, "", {"run.name": run})
    for step in (process, render):
        step.work(step.build_parser().parse_args(["--config", CONFIG]), config)
    return command.guard("sft-train", lambda: train.work(train.build_parser().parse_args(["--config", CONFIG]), config))


def live(work: Callable[[], int], log: Path) -> int:
    """Run ``work`` in a forked process; returns its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = work()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    """Exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def meddle(at: int, folder: Path, how: str, counter: Path | None = None) -> None:
    """From now on count this process's file operations in the run's folders, and at number ``at`` do ``how``:

    ``kill`` it, or have the disk ``full`` from there on; ``count`` only writes each into ``counter``.
    """
    watched = (str(folder / "outputs"), str(folder / "adapters"), "outputs/", "adapters/")
    seen = 0

    def operation(path: object, grows: bool) -> None:
        nonlocal seen
        if not isinstance(path, str | Path) or not str(path).startswith(watched):
            return
        seen += 1
        if counter is not None:
            os.write(count_to, f"{path}\n".encode())
        if how == "kill" and seen == at:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "full" and seen >= at and grows:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in EVENTS and arguments:
            if event == "open" and isinstance(arguments[2], int) and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return  # reading changes nothing
            grows = event in ("open", "os.mkdir", "os.symlink")
            operation(arguments[1] if event == "os.symlink" else arguments[0], grows)

    count_to = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if counter else -1
    real_sync = os.fsync

    def fsync(descriptor: int) -> None:  # a sync raises no audit event; it is where a full disk shows at the latest
        operation(os.readlink(f"/proc/self/fd/{descriptor}") if os.path.isdir("/proc/self/fd") else "outputs/", True)
        real_sync(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)


def weights_of(run: str, folder: Path) -> str | None:
    from scripts.utils import files

    path = folder / "adapters" / run / "adapter_model.safetensors"
    return files.sha256_file(path) if path.is_file() else None


def last_saved(run: str, folder: Path) -> int:
    """Step of the newest checkpoint that is whole; -1 where there is none."""
    from scripts.utils import checkpoints

    found, _ = checkpoints.newest_whole(folder / "outputs" / run)
    return checkpoints.step_of(found) if found else -1


def stamp_of(run: str, folder: Path) -> dict[str, Any]:
    path = folder / "outputs" / run / "backend.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def status_of(run: str, folder: Path) -> str | None:
    return stamp_of(run, folder).get("status")


def from_step(run: str, folder: Path) -> int:
    return int(stamp_of(run, folder)["starts"][-1]["from_step"])


def finish(run: str, folder: Path, log: Path, quiet: str, outcome: Outcome, what: str) -> None:
    """Resume ``run`` to its end and compare it with the quiet run."""
    done = status_of(run, folder) == "finished"
    saved = last_saved(run, folder)
    code = ended(live(lambda: train(run, folder), log))
    if code != 0:
        outcome.failures.append(f"{what}: the resumed run ended with {code} (see {log})")
    elif weights_of(run, folder) != quiet:
        outcome.failures.append(f"{what}: the adapter differs from the quiet run's")
    elif not done and max(saved, 0) != from_step(run, folder):
        outcome.failures.append(f"{what}: checkpoint-{saved} was whole, it went on from {from_step(run, folder)}")
    outcome.resumed += 1


def kill_at_random(folder: Path, kills: int, quiet: str, seconds: float, outcome: Outcome, seed: int) -> Iterator[str]:
    """One run after another, each killed at random moments until it ends by itself."""
    dice = random.Random(seed)
    number = 0
    while outcome.kills < kills:
        number += 1
        run, log = f"random-{number}", folder / f"random-{number}.log"
        for _ in range(12):
            saved = last_saved(run, folder)
            child = live(lambda run=run: train(run, folder), log)
            time.sleep(dice.uniform(0.0, 1.1 * seconds))
            os.kill(child, signal.SIGKILL)
            if ended(child) == 0 or outcome.kills >= kills:
                break  # it was faster than its killer
            outcome.kills += 1
            if last_saved(run, folder) < saved:
                outcome.failures.append(f"{run}: checkpoint-{saved} was lost by a kill")
            yield f"{outcome.kills}/{kills} kills"
        finish(run, folder, log, quiet, outcome, run)


def at_each_point(folder: Path, quiet: str, outcome: Outcome, most: int, how: str) -> Iterator[str]:
    """Kill once at each file operation of a whole run (or at ``most`` of them, evenly spread), then resume.

    With ``how`` full the disk is full from that operation on instead: the run must end with exit code 4.
    """
    counter = folder / f"operations-{how}.txt"

    def counted() -> int:
        meddle(0, folder, "count", counter)
        return train(f"counted-{how}", folder)

    ended(live(counted, folder / "counted.log"))
    points = len(counter.read_text().splitlines())
    chosen = range(1, points + 1) if points <= most else sorted({1 + i * points // most for i in range(most)})
    for done, number in enumerate(chosen, 1):
        run, log = f"{how}-{number}", folder / f"{how}-{number}.log"

        def meddled(run: str = run, number: int = number) -> int:
            meddle(number, folder, how)
            return train(run, folder)

        code = ended(live(meddled, log))
        what = f"{how} at operation {number} of {points}"
        if how == "kill" and code == -signal.SIGKILL:
            outcome.crash_points += 1
        if how == "full":
            text = log.read_text()
            outcome.full_disks += code == 4
            # 0: only the removal of what rotates out, or the last words, were left
            if code not in (4, 0) or (
                code == 4 and ("bytes" not in text or ("outputs" not in text and "adapters" not in text))
            ):
                outcome.failures.append(f"{what}: ended with {code} instead of 4 with path and bytes (see {log})")
        finish(run, folder, log, quiet, outcome, what)
        for part in ("outputs", "adapters"):
            shutil.rmtree(folder / part / run, ignore_errors=True)
        yield f"{how}: {done}/{len(chosen)} of {points} operations"


def stop_at_random(folder: Path, stops: int, quiet: str, seconds: float, outcome: Outcome, seed: int) -> Iterator[str]:
    """SIGINT and SIGTERM in turn; each must end with its own exit code, and the resumed run as the quiet one."""
    dice = random.Random(seed)
    for number in range(stops):
        asked = (signal.SIGINT, signal.SIGTERM)[number % 2]
        run, log = f"stop-{number}", folder / f"stop-{number}.log"
        child = live(lambda run=run: train(run, folder), log)
        time.sleep(dice.uniform(0.05, seconds))
        os.kill(child, asked)
        code = ended(child)
        if code not in (128 + asked, 0):  # 0: it was at its end
            outcome.failures.append(f"{run}: {asked.name} ended it with {code}")
        if code:
            outcome.kills += 1
        finish(run, folder, log, quiet, outcome, f"{run} ({asked.name})")
        yield f"{number + 1}/{stops} stops"


def torture(
    folder: Path,
    model: Path,
    *,
    kills: int,
    points: int,
    full: int,
    stops: int,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Everything above in ``folder``; every failure is named in the outcome."""
    # all of it before the forks
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import pydantic.main  # noqa: F401
    import tensorboard.plugins.hparams.summary_v2
    import tensorboard.summary.writer.record_writer  # noqa: F401

    import scripts.process
    import scripts.render
    import scripts.train  # noqa: F401
    from scripts.utils import callbacks, schema, self_test, training  # noqa: F401

    prepare(folder, model)
    outcome = Outcome()
    began = time.monotonic()
    code = ended(live(lambda: train("quiet", folder), folder / "quiet.log"))
    seconds = time.monotonic() - began
    quiet = weights_of("quiet", folder)
    if code or quiet is None:
        outcome.failures.append(f"the quiet run ended with {code} (see {folder / 'quiet.log'})")
        return outcome
    say(f"torture: a quiet run takes {seconds:.1f} s")
    for part in (
        kill_at_random(folder, kills, quiet, seconds, outcome, seed),
        at_each_point(folder, quiet, outcome, points, "kill") if points else iter(()),
        at_each_point(folder, quiet, outcome, full, "full") if full else iter(()),
        stop_at_random(folder, stops, quiet, seconds, outcome, seed),
    ):
        last = 0.0
        for progress in part:
            if time.monotonic() - last > 20:
                last = time.monotonic()
                say(f"torture: {progress}, {len(outcome.failures)} failures, {last - began:.0f} s")
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=int(os.environ.get("SFT_KILLS") or 200))
    parser.add_argument("--points", type=int, default=400, help="at most this many crash points")
    parser.add_argument("--full", type=int, default=60, help="at most this many operations from which the disk is full")
    parser.add_argument("--stops", type=int, default=20, help="SIGINT and SIGTERM")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from scripts.utils import environment
    from scripts.utils.files import REPO_ROOT

    environment.prepare(REPO_ROOT)
    environment._HEAVY = ()  # the forked runs find everything imported
    from tests.tiny_models import smollm2_tokenizer, tiny_llama

    folder = Path(tempfile.mkdtemp(prefix="sft-torture-"))
    model = folder / "model"
    tiny_llama().save_pretrained(model)
    smollm2_tokenizer().save_pretrained(model)
    outcome = torture(
        folder,
        model,
        kills=arguments.kills,
        points=arguments.points,
        full=arguments.full,
        stops=arguments.stops,
        seed=arguments.seed,
    )
    print(
        f"torture: {outcome.kills} kills and stops, {outcome.crash_points} crash points, {outcome.full_disks} full disks, "
        f"{outcome.resumed} runs resumed and compared, {len(outcome.failures)} failures"
    )
    for failure in outcome.failures:
        print(f"  {failure}")
    if not outcome.failures:
        shutil.rmtree(folder)
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
