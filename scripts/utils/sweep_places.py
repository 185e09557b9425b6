"""Where the runs of a sweep work: a place for each that may go on at a time, and a lock against a second sweep of the same name."""

import contextlib
import os
from collections.abc import Iterator
from itertools import takewhile

from scripts.utils import console, files, hardware, sweep_state, workers
from scripts.utils.errors import RefusedError

# what a step may take from the environment; the rest of make's variables is in the run's own config
_HANDED_ON = ("SFT_MODEL_CACHE", "SFT_DATA_CACHE", "SFT_ENV_PYTHON", "SFT_ANY_PYTHON")
_SAVING = 900.0  # seconds that the children of a killed sweep may take to save and end


def devices(jobs: int | None) -> list[str | None]:
    """A place for each run that may go on at a time: the CUDA_VISIBLE_DEVICES that it gets, None where there is no card.

    Cards are those of this process's own CUDA_VISIBLE_DEVICES, else all that nvidia-smi names; torch is not asked.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = hardware.nvidia("uuid").splitlines() if given is None else given.split(",")
    cards = list(takewhile(lambda card: card not in ("", "-1"), (card.strip() for card in named)))
    return [cards[number % len(cards)] if cards else None for number in range(jobs or len(cards) or 1)]


@contextlib.contextmanager
def only_one(name: str) -> Iterator[int]:
    """Hold the sweep's lock, and the lock that its children take along; yields the descriptor of the latter.

    Raises ``RefusedError`` where the same sweep is going on. Waits for the children of one that was killed: they have
    been told to stop (on Linux) and may be saving.
    """
    folder = sweep_state.folder_of(name)
    hint = "wait until it ends; or another sweep: --name, or a plan with another file name"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.file_lock(folder / ".lock", wait_seconds=0, what=f"sweep {name!r}"))
        except RefusedError as problem:
            raise RefusedError(problem.message, hint) from problem
        children = folder / ".children.lock"
        try:
            descriptor = stack.enter_context(files.file_lock(children, wait_seconds=0, what=name))
        except RefusedError:
            console.note("sweep", "a run of the killed sweep is still ending; waiting for it to save")
            try:
                lock = files.file_lock(children, wait_seconds=_SAVING, what=f"a run of the killed sweep {name!r}")
                descriptor = stack.enter_context(lock)
            except RefusedError as problem:
                raise RefusedError(problem.message, "wait until it ends, or end that process yourself") from problem
        yield descriptor


def environment(device: str | None, places: int) -> dict[str, str]:
    """The environment of a step: its card, and without one its share of the processors."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("SFT_") or name in _HANDED_ON}
    if device is not None:
        kept["CUDA_VISIBLE_DEVICES"] = device
    elif places > 1:
        kept.setdefault("OMP_NUM_THREADS", str(max(1, workers.cores() // places)))
    return kept
