"""scripts/train.py with an eye on it: notes which rows each rank computes and which files it writes, and ends a rank where a
test wants it.

    SFT_NPROC=2 python tests/rank_probe.py --config tiny.yaml

``PROBE_KILL=rank:step:signal`` sends that rank the signal in the middle of that step, once; ``PROBE_FAULT=rank:step:nan`` (or
``memory``) gives it a loss that is no number there, or takes its memory away for a moment. ``PROBE_ENGINES`` names a folder
with the engines' files in the place of env/.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts import train
from scripts.utils import command, launching, ranks, sharding


def note_rows() -> None:
    from scripts.utils.training import SFTTrainer

    original = SFTTrainer._share

    def share(self, inputs):
        found = original(self, inputs)
        step = self.state.global_step + 1
        line = {
            "rank": ranks.rank(),
            "step": step,
            "rows": [part for part, times in found if times],
            "given": inputs,
            "sharded": self.sharded,
        }
        with Path(f"probe-{ranks.rank()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        victim = os.environ.get("PROBE_KILL", "").split(":")
        done = Path("probe-killed")
        if len(victim) == 3 and [ranks.rank(), step] == [int(victim[0]), int(victim[1])] and not done.exists():
            done.write_text(str(time.time()))
            os.kill(os.getpid(), int(victim[2]))
        fault = os.environ.get("PROBE_FAULT", "").split(":")
        if fault[:2] == [str(ranks.rank()), str(step)]:
            plant(self, fault[2])
        return found

    SFTTrainer._share = share


def plant(trainer, what):
    import torch

    original = trainer.loss

    def loss(model, row):
        trainer.loss = original
        if what == "memory":
            os.environ.pop("PROBE_FAULT", None)
            raise torch.OutOfMemoryError("planted")
        return original(model, row) * float("nan")

    trainer.loss = loss


def note_writes() -> None:
    """Audit events (PEP 578) of what changes files in the working folder, raised just before it happens."""
    here = os.getcwd()
    log = open(f"probe-writes-{ranks.rank()}.txt", "a")  # noqa: SIM115  # for as long as this process lives

    def note(event, arguments):
        if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.symlink"):
            return
        flags = arguments[2] if event == "open" else os.O_WRONLY
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            path = os.path.abspath(os.fsdecode(arguments[0])) if isinstance(arguments[0], str | bytes) else ""
            if path.startswith(here + "/") and "/probe-" not in path:
                log.write(f"{event} {path}\n")
                log.flush()

    sys.addaudithook(note)


if __name__ == "__main__":
    if not ranks.is_rank():
        wanted = launching.layout()
        raise SystemExit(command.guard("probe", lambda: launching.run(wanted, Path(__file__), sys.argv[1:])))

    def start(arguments, config):
        sharding.CONFIGS = Path(os.environ.get("PROBE_ENGINES") or sharding.CONFIGS)
        note_rows()
        note_writes()
        train.work(arguments, config)
        ranks.leave()

    raise SystemExit(command.run(train.build_parser(), start))
