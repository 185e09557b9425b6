"""Ctrl-C, SIGTERM and a closed terminal (SIGHUP) as exceptions that get through, wherever in the work they arrive.

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
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_CLOSED = ("SIGHUP",) if hasattr(signal, "SIGHUP") else ()  # Windows has none
ALL = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", *_CLOSED))
_AGAIN = 0.05  # seconds until a forgotten one is raised once more: by then the callback has returned
_ONE_WISH = 5.0  # seconds
_ONE_PRESS = 0.05  # no hand is as fast


class Terminated(BaseException):
    """SIGTERM or SIGHUP, as KeyboardInterrupt is SIGINT."""


_heard = (0, 0.0)  # the newest that was no echo, and when
_unanswered = 0  # the one that was raised and has not been dealt with
_over = False  # the block has ended, and with it what could be saved


def is_echo(number: int, *, of_any: bool = False) -> bool:
    """Whether ``number`` only repeats what was said a moment ago. Ask once for each that arrives.

    SIGTERM and SIGHUP often come twice: make hands on what the whole process group has got, and so do a cluster's
    manager, a shell and the system when a terminal closes. A second Ctrl-C is one of its own, unless it comes at once, as
    from a wrapper that hands on what the terminal has sent already, or ``of_any``, where several ranks hear the same.
    """
    global _heard
    before, at = _heard
    window = _ONE_WISH if of_any or number != signal.SIGINT else _ONE_PRESS
    if before and time.monotonic() - at < window:
        return True
    _heard = number, time.monotonic()
    return False


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raises KeyboardInterrupt or ``Terminated`` out of the block, also where something on the way made it another error.

    After the block they end the process at once.
    """
    global _over
    _over = False
    answered()
    handle(_raise)
    before = sys.unraisablehook
    sys.unraisablehook = functools.partial(_raise_again, otherwise=before)
    try:
        yield
    except Exception as error:
        if _unanswered:
            raise exception(_unanswered) from error
        raise
    finally:
        sys.unraisablehook = before
        _over = True


def handle(handler: Callable[[int, Any], None]) -> dict[signal.Signals, Any]:
    """Let ``handler`` have them all, but for one that is ignored (nohup means it); returns the handlers before.

    What it hears first is no echo. A closed terminal means what SIGTERM means, save and end, and is told as that.
    """
    global _heard
    _heard = (0, 0.0)

    def told(number: int, frame: object) -> None:
        handler(meant_by(number), frame)

    return {number: signal.signal(number, told) for number in ALL if signal.getsignal(number) is not signal.SIG_IGN}


def meant_by(number: int) -> int:
    return number if number == signal.SIGINT else int(signal.SIGTERM)


def put_back(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def answered() -> None:
    """The signal has been dealt with (a Ctrl-C at a prompt): an error from now on is an error."""
    global _heard, _unanswered
    _heard, _unanswered = (0, 0.0), 0


def exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated()


def _raise(number: int, frame: object) -> None:
    global _unanswered
    if is_echo(number):
        return
    if _over:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    _unanswered = number
    raise exception(number)


def _raise_again(lost: "sys.UnraisableHookArgs", otherwise: Callable[..., Any]) -> None:
    if not issubclass(lost.exc_type, KeyboardInterrupt | Terminated):
        otherwise(lost)
        return
    number = signal.SIGINT if issubclass(lost.exc_type, KeyboardInterrupt) else signal.SIGTERM
    answered()  # it was not: what comes now is no echo
    said = threading.Event()
    with contextlib.suppress(RuntimeError):  # no new threads while Python ends, and then it is ending anyway
        # a daemon: work that is over by then is over
        threading.Thread(target=_send, args=(number, said), daemon=True).start()
    said.set()  # raised in here, it would be lost for good: nothing is told of that


def _send(number: int, after: threading.Event) -> None:
    """The signal to this process's main thread; a real one, where there are such, also ends what it waits for."""
    after.wait()
    time.sleep(_AGAIN)
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:  # Windows
        _thread.interrupt_main(signal.Signals(number))
