"""On the PYTHONPATH of a process under test: whatever there looks for another machine is written down and refused.

Addresses of this machine (a Unix socket, loopback) are allowed; looking a name up counts as reaching out. Python's own audit
events are used, which no library can go around from Python; tests/test_no_network.py watches the rest from outside.
"""

import ipaddress
import os
import sys
import traceback

_LOG = os.environ.get("SFT_NETWORK_LOG")
_WITH_ADDRESS = ("socket.connect", "socket.sendto", "socket.sendmsg")  # (socket, address)
_WITH_NAME = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")  # (name, …)


def is_here(host: object) -> bool:
    """Whether a host is this machine, said in a way that asks no name service."""
    if host in (None, "", b"", "localhost", b"localhost"):
        return True
    text = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host)
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _watch(event: str, arguments: tuple) -> None:
    if event in _WITH_ADDRESS:
        address = arguments[1]
        if address is None or isinstance(address, str | bytes):  # a Unix socket, or one that is connected already
            return
        host = address[0] if isinstance(address, tuple) else address
    elif event in _WITH_NAME:
        host = arguments[0]
    else:
        return
    if is_here(host):
        return
    calls = " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(traceback.extract_stack()[-12:-1]))
    with open(str(_LOG), "a", encoding="utf-8") as file:
        file.write(f"{event} {host!r} by {' '.join(sys.argv)} | {calls}\n")
    raise OSError(f"no network in this test: {event} {host!r}")


if _LOG:
    sys.addaudithook(_watch)
