"""The processes of one run: how many there are, which of them this is, and what they tell one another.

torchrun tells each process (a rank) its place by environment variables. In a run of one process nothing here does
anything. What the ranks say to one another goes over gloo, on the CPU: a few numbers a step, in the order of the ranks, so
that all of them come to the same decisions.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from scripts.utils import lifetime
from scripts.utils.errors import MachineError

T = TypeVar("T")
WANTED = "SFT_RANKS"  # how many ranks the launcher started
REPORTS = "SFT_RANK_REPORTS"  # the folder where each rank leaves for the launcher how it ended
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# a peer that is gone is noticed at once; this is for one that makes tokens, saves or tests its export for long
_PATIENCE = timedelta(hours=2)
_LOST = (
    "gloo",
    "NCCL",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "recvValue",
    "TCPStore",
)


class LostPeer(MachineError):
    """Another rank is gone; why, that rank says itself."""


def is_rank() -> bool:
    """Whether torchrun (or another launcher that speaks its variables) started this process."""
    return all(os.environ.get(name) for name in _PLACE)


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"]) if is_rank() else 1


def rank() -> int:
    return int(os.environ["RANK"]) if is_rank() else 0


def local_rank() -> int:
    return int(os.environ["LOCAL_RANK"]) if is_rank() else 0


def is_first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def outside(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child process that is no rank."""
    mine = (*_PLACE, WANTED, REPORTS)
    return {
        k: v for k, v in environment.items() if k not in mine and not k.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_"))
    }


def place_of(device: str) -> str:
    """A rank's own device of that kind: its card, not the first one."""
    return f"cuda:{local_rank()}" if device == "cuda" and is_rank() else device


def connect() -> None:
    """Join the other ranks; raises ``MachineError`` where not as many came as were asked for."""
    wanted = int(os.environ.get(WANTED) or world_size())
    found = world_size()
    if found > 1:
        found = _join()
    if found != wanted:
        raise MachineError(
            f"{wanted} processes were asked for, {found} run",
            "start them by make train NPROC=…, which uses torchrun; without NPROC a run is one process",
        )


def _join() -> int:
    import torch
    import torch.distributed as dist

    lifetime.end_with_parent()  # however the launcher ends, no rank goes on alone
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    with _peers():
        dist.init_process_group(backend, timeout=_PATIENCE)
    return len(gather([0.0]))


def leave() -> None:
    """Part from the others; what one rank does alone from here on keeps none of them waiting."""
    if world_size() > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise as_lost(error) from error


def gather(values: Sequence[float]) -> list[list[float]]:
    """Every rank's ``values`` (as many on each), in the order of the ranks, on all of them."""
    if world_size() < 2:
        return [list(values)]
    import torch
    import torch.distributed as dist

    mine = torch.tensor(list(values), dtype=torch.float64)
    found = [torch.empty_like(mine) for _ in range(world_size())]
    with _peers():
        dist.all_gather(found, mine)
    return [values.tolist() for values in found]


def gather_objects(value: T) -> list[T]:
    """As ``gather``, for anything."""
    if world_size() < 2:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world_size()
    with _peers():
        dist.all_gather_object(found, value)
    return found


def from_first(make: Callable[[], T]) -> T:
    """What ``make`` returns on the first rank, on every rank; the others do not call it."""
    if world_size() < 2:
        return make()
    import torch
    import torch.distributed as dist

    found: list[Any] = [make() if is_first() else None]
    with _peers():
        dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    return found[0]


def barrier() -> None:
    gather([0.0])


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """Inside, the first rank is done before the others begin, which then find what it fetched, measured or wrote."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()


def require_one_disk(path: Path) -> None:
    """Raise ``MachineError`` where not every rank sees a file that the first one has just made."""
    if world_size() < 2:
        return
    barrier()
    deadline = time.monotonic() + (0 if is_first() else 10)  # a network's disk may take a moment to show it
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = [number for number, (seen,) in enumerate(gather([path.exists()])) if not seen]
    if blind:
        raise MachineError(
            f"{path.parent.absolute()}: process {blind[0]} does not see this folder of the first one",
            "several machines need the project, at least outputs/, on a disk that they share",
        )


def require_same(value: T, what: str) -> None:
    """Raise ``MachineError`` where the ranks would not train the same: other rows, model or settings on one of them."""
    found = gather_objects(value)
    other = [number for number, theirs in enumerate(found) if theirs != found[0]]
    if other:
        raise MachineError(
            f"process {other[0]} has other {what} than the first one", "give every machine the same files and variables"
        )


def deal(items: Sequence[T], *, even: bool = False) -> list[tuple[T, int]]:
    """This rank's share, every world-size-th item, each with how often it counts: once.

    ``even``: a rank that got fewer than others takes the first item once more, which counts zero times, so that all of
    them do as many passes.
    """
    count = world_size()
    mine = [(item, 1) for item in items[rank() :: count]]
    if even and items and len(mine) < -(-len(items) // count):
        mine.append((items[0], 0))
    return mine


# --- how a rank ended, for the launcher to say once


def report(message: str, hint: str, code: int, *, lost: bool = False) -> bool:
    """Leave how this rank ended; False where no launcher waits to read it, so that the process says it itself."""
    folder = os.environ.get(REPORTS)
    if not folder or not is_rank():
        return False
    said = {"message": message, "hint": hint, "code": code, "lost": lost, "at": time.time()}
    path = Path(folder) / f"{rank()}.json"
    with contextlib.suppress(OSError):
        path.with_suffix(".new").write_text(json.dumps(said), encoding="utf-8")
        path.with_suffix(".new").replace(path)
        return True
    return False


def as_lost(error: Exception) -> Exception:
    """An error that says only that another rank is gone, as ``LostPeer``; others unchanged."""
    if world_size() < 2 or not isinstance(error, RuntimeError) or not any(word in str(error) for word in _LOST):
        return error
    return LostPeer(
        "another process of this run is gone",
        "its own message says why; the same command goes on from the last checkpoint",
    )
