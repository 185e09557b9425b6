"""serve: a run behind an OpenAI-compatible address, by an existing engine: transformers serve, or vLLM.

Listens on this machine only, unless SERVE_API_KEY is set and every request is asked for it. Ends at Ctrl-C.
"""

import argparse
import contextlib
import dataclasses
import http.client
import importlib.util
import ipaddress
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.utils import command, console, files, lifetime, prompts, servers, stamp
from scripts.utils.config import run_name
from scripts.utils.engine_child import KEY, Question
from scripts.utils.errors import MachineError, RefusedError, UserError

if TYPE_CHECKING:
    from scripts.utils.schema import Config

DEFAULT_PORT = 8000


def build_parser() -> argparse.ArgumentParser:
    examples = [
        "make serve RUN=try1",
        "make serve RUN=try1 PORT=9000 WHICH=merged",
        "SERVE_API_KEY=… make serve RUN=try1 LISTEN=0.0.0.0",
    ]
    parser = command.new_parser("serve", __doc__ or "", examples, keys=["run", "raw"], of_run=True)
    parser.add_argument("--which", choices=["tuned", "merged"], default="tuned", help="which model of the run (tuned)")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers", help="what serves it")
    parser.add_argument("--port", default=command.from_make("PORT"), help=f"port to listen on ({DEFAULT_PORT})")
    parser.add_argument(
        "--listen", default=servers.LOOPBACK, metavar="ADDRESS", help=f"address to listen on ({servers.LOOPBACK})"
    )
    return parser


def work(arguments: argparse.Namespace, config: "Config") -> int:
    run = run_name(config, arguments.config)
    port = servers.parse_port(arguments.port, DEFAULT_PORT)
    host = check_address(arguments.listen)
    check_engine(arguments.engine)
    system = stamp.system_of(stamp.require(run))
    if not servers.is_free(port, host):
        raise UserError(f"port {port} is in use on {host}", "end what listens there, or name another: PORT=…")
    with tempfile.TemporaryDirectory(prefix="sft-serve-") as folder:
        settings = config.infer.model_dump()
        question = Question(run, arguments.which, arguments.engine, host, port, folder, settings)
        with engine(question) as child:
            if code := wait_until_up(child, question):
                return code  # the engine's process has said why
            check_key(question)
            announce(question, system)
            try:
                code = child.wait()
            except KeyboardInterrupt:
                console.note("serve", "stopped")
                return 0
            raise MachineError(f"{question.engine} ended by itself (code {code})", "see what it said above")


def check_address(listen: str) -> str:
    """The address to listen on; raises ``RefusedError`` for one beyond this machine without a key."""
    try:
        host = str(ipaddress.ip_address(servers.LOOPBACK if listen == "localhost" else listen))
    except ValueError as error:
        raise UserError(
            f"--listen {listen}: not an address", "give an IP address such as 0.0.0.0, or leave it out"
        ) from error
    if not ipaddress.ip_address(host).is_loopback and not os.environ.get(KEY):
        raise RefusedError(
            f"listening on {host} would let everyone on the network use the model",
            f"set a key first, in .env or the shell: {KEY}=…; or stay on {servers.LOOPBACK}",
        )
    return host


def check_engine(engine: str) -> None:
    if engine == "vllm":
        if not shutil.which("vllm"):
            raise MachineError("vLLM is not installed here", "install it (docs.vllm.ai), or leave ENGINE out")
        return
    missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        raise MachineError(f"serving needs packages: {', '.join(missing)}", "make install EXTRAS=serve")


@contextlib.contextmanager
def engine(question: Question) -> "Iterator[subprocess.Popen[bytes]]":
    """The serving process, ended with all its children when the block ends."""
    paths = os.pathsep.join([str(files.REPO_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    key = os.environ.get(KEY, "")
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "scripts.utils.engine_child", json.dumps(dataclasses.asdict(question))],
        env={**os.environ, "PYTHONPATH": paths} | ({"VLLM_API_KEY": key} if key else {}),
        stdin=subprocess.DEVNULL,
        stdout=2,  # its log is no result, so to stderr
        start_new_session=True,  # a Ctrl-C on the terminal reaches it through this process only
        preexec_fn=lifetime.in_child,  # noqa: PLW1509 - this process has no threads
    )
    try:
        yield child
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave anything behind
        if child.poll() is None:
            servers.end(child, signal.SIGINT)
        servers.kill_session(child)


def wait_until_up(child: "subprocess.Popen[bytes]", question: Question) -> int:
    """Wait until the engine answers, for as long as it loads; returns its exit code where it ended first."""
    started = said = time.monotonic()
    while child.poll() is None:
        if ask(question, "/health") == 200:
            return 0
        if time.monotonic() - said >= 10:
            said = time.monotonic()
            console.note("serve", f"loading the model, {console.duration(said - started)}")
        time.sleep(0.2)
    if child.returncode in (2, 3, 4):
        return child.returncode
    raise MachineError(
        f"{question.engine} ended with code {child.returncode} before it answered", "see what it said above"
    )


def ask(question: Question, path: str, key: str = "") -> int:
    """The status of a GET, 0 where nothing answers."""
    host = servers.LOOPBACK if question.host == "0.0.0.0" else "::1" if question.host == "::" else question.host
    connection = http.client.HTTPConnection(host, question.port, timeout=5)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def check_key(question: Question) -> None:
    """Proof that the engine asks for the key; raises ``RefusedError`` where it does not."""
    key = os.environ.get(KEY, "")
    if key and (ask(question, "/v1/models") != 401 or ask(question, "/v1/models", key) != 200):
        raise RefusedError(
            f"{question.engine} does not ask for {KEY}: it was ended", "serve without a key, on this machine only"
        )


def announce(question: Question, system: str | None) -> None:
    address = f"http://{question.host}:{question.port}/v1"
    key = os.environ.get(KEY)
    messages = prompts.with_system([{"role": "user", "content": "Hello"}], system)
    body = json.dumps({"model": question.run, "messages": messages, "temperature": 0}, ensure_ascii=False)
    bearer = f' -H "Authorization: Bearer ${KEY}"' if key else ""
    console.facts(
        f"run {question.run} answers at {address}",
        [
            ("model", question.run),
            ("key", f"{KEY}, asked for" if key else f"none: only this machine can reach it ({question.host})"),
            *(
                [("system", "the engine adds none: send the one of training as the first message, as below")]
                if system
                else []
            ),
            (
                "try",
                f"curl {address}/chat/completions -H 'Content-Type: application/json'{bearer} -d {shlex.quote(body)}",
            ),
            ("end", "Ctrl-C"),
        ],
    )


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(build_parser(), work, argv)


if __name__ == "__main__":
    raise SystemExit(main())
