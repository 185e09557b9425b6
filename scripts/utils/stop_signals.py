"""Ctrl-C and SIGTERM as exceptions that get through, wherever in the work they arrive.

Python runs a signal's handler between any two steps of the interpreter. What it raises in a weak reference's callback or
in a finalizer is printed and forgotten, and the step would go on; a library in between may turn it into an error of its
own, and the step would seem to have failed. Both were seen while modules were loading.
"""

import _thread
import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_AGAIN = 0.01  # seconds until a forgotten one is raised once more: by then the callback has returned

_arrived = 0  # the signal that has been raised and not yet answered


class Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT."""


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raises KeyboardInterrupt or ``Terminated`` out of the block, also where something on the way made it another error.

    The handlers stay afterwards. A signal that is ignored (nohup) stays so, and so does a handler of one's own for SIGINT.
    """
    answered()
    signal.signal(signal.SIGTERM, _raise)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _raise)
    before = sys.unraisablehook
    sys.unraisablehook = functools.partial(_raise_again, otherwise=before)
    try:
        yield
    except Exception as error:
        if _arrived:
            raise _exception(_arrived) from error
        raise
    finally:
        sys.unraisablehook = before


def answered() -> None:
    """The signal has been dealt with (a Ctrl-C at a prompt): an error from now on is an error."""
    global _arrived
    _arrived = 0


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated()


def _raise(number: int, frame: object) -> None:
    global _arrived
    _arrived = number
    raise _exception(number)


def _raise_again(lost: "sys.UnraisableHookArgs", otherwise: Callable[..., Any]) -> None:
    if not issubclass(lost.exc_type, KeyboardInterrupt | Terminated):
        otherwise(lost)
        return
    number = signal.SIGINT if issubclass(lost.exc_type, KeyboardInterrupt) else signal.SIGTERM
    with contextlib.suppress(RuntimeError):  # no new threads while Python ends, and then it is ending anyway
        timer = threading.Timer(_AGAIN, _thread.interrupt_main, (number,))
        timer.daemon = True  # work that is over by then is over
        timer.start()
