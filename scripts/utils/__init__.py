"""The parts that the steps share, in floors: each imports only from the floors above it."""

import signal
import sys
from pathlib import Path

# while the modules of a step load, a Ctrl-C ends it without a traceback: nothing has begun. command.guard takes over
if (
    Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[1]
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
