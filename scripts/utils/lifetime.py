"""A child that never outlives its parent. Linux tells it of the parent's end (prctl(2)); on other systems nothing does."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(by: int = signal.SIGTERM, *, parent: int | None = None) -> None:
    """In a new child: get the signal ``by`` when the parent dies, even by SIGKILL.

    ``parent``, its process id, also ends a child whose parent was gone before the system was told.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, by)
    if parent is not None and os.getppid() != parent:
        os._exit(128 + by)


# for Popen's preexec_fn, which other systems may not have at all
in_child = end_with_parent if sys.platform == "linux" else None
