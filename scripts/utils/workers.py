"""Both cores for work on many rows: chunks go to worker processes, their results come back in order.

Few rows are done in this process, and so are all where processes cannot be forked safely (macOS, Windows).
"""

import contextlib
import itertools
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from scripts.utils import lifetime
from scripts.utils.errors import MachineError

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")
R = TypeVar("R")
_MOST = 8  # a worker costs memory; beyond this the process that writes is what one waits for
_STOPPING = (signal.SIGINT, signal.SIGTERM)
_AHEAD = 3  # chunks in flight a worker: enough to keep it busy, few enough to keep memory small

_work: Callable[[Any], Any] | None = None  # of this process's children: a fork takes it along, whatever it refers to


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(work: Callable[[T], R], chunks: Iterable[T], processes: int | None = None) -> Iterator[R]:
    """``work(chunk)`` for each chunk, in the order of the chunks; what a worker raises is raised here.

    The first two chunks decide: where there is only one, no process is started. Raises ``MachineError`` when a worker
    is killed from outside, as the system does where memory runs out.
    """
    count = min(processes or cores(), _MOST)
    chunks = iter(chunks)
    first = list(itertools.islice(chunks, 2))
    everything = itertools.chain(first, chunks)
    if count < 2 or len(first) < 2 or sys.platform != "linux":
        yield from map(work, everything)
        return
    import multiprocessing  # here: --help must not wait for these
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    global _work
    _work = work
    executor = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _prepare, (os.getpid(),))
    waiting: deque[Future[R]] = deque()
    try:
        for chunk in everything:
            with _no_signals():
                waiting.append(executor.submit(_run, chunk))
            if len(waiting) > count * _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as problem:
        raise MachineError(
            "a worker process was ended from outside, most likely because memory ran out",
            "free some memory, then run the same command again",
        ) from problem
    finally:
        _work = None
        executor.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _no_signals() -> Iterator[None]:
    """Ctrl-C and the like wait until the block ends.

    The first chunks start the workers: an exception there would leave some that no one ends, and Python waits for them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(chunk: Any) -> Any:
    assert _work is not None
    return _work(chunk)


def _prepare(parent: int) -> None:
    """In a new worker: Ctrl-C is the parent's to answer, and the worker ends with the parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)  # a fork takes the mask along
    lifetime.end_with_parent(signal.SIGKILL, parent=parent)


def numbered(lines: Iterable[T], size: int) -> Iterator[tuple[int, list[T]]]:
    """Lists of ``size`` items, the last one shorter, each with the number of its first item, from 1."""
    lines, first = iter(lines), 1
    while batch := list(itertools.islice(lines, size)):
        yield first, batch
        first += len(batch)
