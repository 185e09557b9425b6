"""What serve promises: the run's own answers over OpenAI's protocol, on this machine only, and nothing left behind."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from scripts import infer, serve
from scripts.utils import chat, engine_child, served, servers, trained
from scripts.utils.engine_child import Question
from scripts.utils.errors import RefusedError, UserError
from scripts.utils.schema import InferSection
from tests.commands import ROOT, environment
from tests.tiny_models import CHATS, RUN, SYSTEM, enter_run

openai = pytest.importorskip("openai")
KEY = "a key of our own"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(serve.KEY, raising=False)
    return enter_run(tmp_path, monkeypatch)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((servers.LOOPBACK, 0))
        return probe.getsockname()[1]


class Server:
    """`sft-serve` as a program of its own, until it answers."""

    def __init__(self, folder: Path, *flags: str, key: str = "") -> None:
        self.port, self.key = free_port(), key
        self._log = (folder / "serve.log").open("w+")
        words = [
            sys.executable,
            ROOT / "scripts/serve.py",
            "--config",
            "c.yaml",
            "--run",
            RUN,
            "--port",
            str(self.port),
        ]
        extra = {serve.KEY: key} if key else {}
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self.program = subprocess.Popen(
            [*map(str, words), *flags],
            cwd=folder,
            env=environment(TMPDIR=str(self.temporary), **extra),
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self.program.stdout
        self.said = self.program.stdout.readline()
        assert "answers at" in self.said, self.log

    @property
    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    @property
    def client(self) -> Any:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=self.key or "none", max_retries=0)

    def ask(self, text: str, **options: Any) -> Any:
        messages = options.pop("messages", [{"role": "user", "content": text}])
        settings = {"model": RUN, "temperature": 0, "max_tokens": 24, **options}
        return self.client.chat.completions.create(messages=messages, **settings)

    def status(self, path: str, **headers: str) -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        try:
            return int(urllib.request.urlopen(request, timeout=20).status)
        except urllib.error.HTTPError as error:
            return error.code

    def end(self, number: int = signal.SIGINT) -> int:
        """Send a signal; prove that nothing of it is left."""
        children = psutil.Process(self.program.pid).children(recursive=True)
        assert children
        self.program.send_signal(number)
        code = self.program.wait(30)
        psutil.wait_procs(children, 10)
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
        assert servers.is_free(self.port)
        return code


@pytest.fixture
def start(run: Path) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def begin(*flags: str, **options: Any) -> Server:
        started.append(Server(run, *flags, **options))
        return started[-1]

    yield begin
    for server in started:
        if server.program.poll() is None:
            server.end(signal.SIGTERM)


def own_answer(capsys: pytest.CaptureFixture[str], prompt: str, *flags: str) -> str:
    """What `make infer` says to the same prompt."""
    capsys.readouterr()
    assert infer.main(["--config", "c.yaml", "--prompt", prompt, *flags]) == 0
    return capsys.readouterr().out.removesuffix("\n")


@pytest.mark.slow
def test_the_openai_client_gets_the_runs_own_answers(
    start: Callable[..., Server], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start()
    assert [model.id for model in server.client.models.list()] == [RUN]
    for question, answer in CHATS:
        assert server.ask(question).choices[0].message.content == answer == own_answer(capsys, question)
    reply = server.ask(CHATS[2][0])
    assert reply.choices[0].finish_reason == "stop" and reply.model.startswith(RUN)
    assert server.ask(CHATS[2][0], max_tokens=3).choices[0].finish_reason == "length"
    pieces = list(server.ask(CHATS[2][0], stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == CHATS[2][1]
    assert len(pieces) > 5 and pieces[-1].choices[0].finish_reason == "stop"

    def both_ways(number: int) -> str:
        reply = server.ask(CHATS[number % 5][0], stream=number % 2 == 0)
        if number % 2:
            return str(reply.choices[0].message.content)
        return "".join(piece.choices[0].delta.content or "" for piece in reply)

    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(both_ways, range(20))) == [CHATS[number % 5][1] for number in range(20)]

    # a conversation of several turns, asked by both ways
    turns = [
        {"role": "user", "content": CHATS[3][0]},
        {"role": "assistant", "content": CHATS[3][1]},
        {"role": "user", "content": CHATS[4][0]},
    ]
    Path("p.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    assert infer.main(["--config", "c.yaml", "--input", "p.jsonl", "--output", "a.jsonl"]) == 0
    assert (
        server.ask("", messages=turns).choices[0].message.content == json.loads(Path("a.jsonl").read_text())["answer"]
    )

    # drawn where a temperature is asked for, as good as greedy where none is
    assert len({server.ask("hello", temperature=20, seed=n).choices[0].message.content for n in range(4)}) > 1
    assert server.ask("hello", temperature=openai.omit).choices[0].message.content == CHATS[3][1]
    stopped = server.ask(CHATS[2][0], stop=['", "par'])
    assert CHATS[2][1].startswith(stopped.choices[0].message.content.removesuffix('", "par'))

    # one model is served, and no route is open that loads others or reads the disk
    with pytest.raises(openai.BadRequestError):
        server.ask("hello", model="another/model")
    for path in ("/load_model", "/reset", "/docs", "/openapi.json", "/v1/audio/transcriptions", "/"):
        assert server.status(path) == 404, path
    assert server.status("/v1/models") == 200
    assert server.status("/v1/models", Host="evil.example") == 400, "a web page must not read under another name"
    addresses = {
        c.laddr.ip
        for child in psutil.Process(server.program.pid).children()
        for c in child.net_connections()
        if c.status == psutil.CONN_LISTEN
    }
    assert addresses == {servers.LOOPBACK}

    assert server.end() == 0
    assert os.listdir(server.temporary) == [] and "Traceback" not in server.log
    for path in Path(f"adapters/{RUN}").rglob("*"):
        assert not path.is_symlink()


@pytest.mark.slow
def test_with_a_key_every_request_is_asked_for_it(start: Callable[..., Server]) -> None:
    server = start("--listen", "0.0.0.0", key=KEY)
    assert KEY not in server.said + server.log
    assert server.ask(CHATS[4][0]).choices[0].message.content == CHATS[4][1]
    assert server.status("/v1/models", Authorization=f"Bearer {KEY}") == 200
    for headers in (
        {},
        {"Authorization": "Bearer "},
        {"Authorization": KEY + "x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
    ):
        for path in ("/v1/models", "/v1/chat/completions", "/load_model"):
            assert server.status(path, **headers) == 401, (path, headers)
    server.key = "wrong"
    with pytest.raises(openai.AuthenticationError, match="wrong or missing"):
        server.ask("hello")
    assert server.status("/health") == 200
    arguments = " ".join(word for p in psutil.process_iter(["cmdline"]) for word in p.info["cmdline"] or [])
    assert KEY not in arguments, "a key on a command line can be read by every user of the machine"
    assert server.end(signal.SIGTERM) == 143


@pytest.mark.slow
def test_the_merged_model_is_served_too(
    start: Callable[..., Server], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts import merge

    assert merge.main(["--config", "c.yaml"]) == 0
    server = start("--which", "merged")
    for question, answer in CHATS:
        assert (
            server.ask(question).choices[0].message.content
            == answer
            == own_answer(capsys, question, "--which", "merged")
        )
    assert server.end() == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "qlora"])
def test_other_ways_of_tuning_are_served_as_they_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    folder = enter_run(tmp_path, monkeypatch, mode=mode)
    server = Server(folder)
    try:
        for question, _ in CHATS:
            assert server.ask(question).choices[0].message.content == own_answer(capsys, question)
    finally:
        assert server.end() == 0


@pytest.mark.slow
def test_the_engine_never_outlives_a_parent_that_was_killed(start: Callable[..., Server]) -> None:
    server = start()
    (child,) = psutil.Process(server.program.pid).children()
    server.program.kill()
    server.program.wait()
    psutil.wait_procs([child], 20)
    assert not child.is_running()


@pytest.mark.slow
def test_ctrl_c_ends_it_in_the_middle_of_an_answer(start: Callable[..., Server]) -> None:
    server = start()
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(server.ask, "hello", max_tokens=100_000, temperature=50)
        time.sleep(1)
        began = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - began < 20
        assert long.exception() is not None or long.result()


# --- what is refused, before anything heavy is loaded


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    code = serve.main(["--config", "c.yaml", *flags])
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return code, captured.err


def test_a_port_in_use_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind((servers.LOOPBACK, 0))
        other.listen()
        port = other.getsockname()[1]
        code, error = refused(capsys, "--port", str(port))
    assert code == 2 and f"port {port} is in use" in error and "PORT=" in error


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1", "8000.5"])
def test_what_is_no_port_is_said(run: Path, capsys: pytest.CaptureFixture[str], port: str) -> None:
    code, error = refused(capsys, f"--port={port}")
    assert code == 2 and f"PORT={port}: not a port" in error


def test_a_run_that_is_not_there_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = refused(capsys, "--run", "gone")
    assert code == 2 and "no run 'gone'" in error and RUN in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code", "said"), [(("--which", "merged"), 2, "make merge"), ((), 3, "does not load")]
)
def test_what_cannot_be_served_ends_with_the_reason_and_its_code(
    run: Path, capfd: pytest.CaptureFixture[str], flags: tuple[str, ...], code: int, said: str
) -> None:
    if not flags:  # a pickle among the files
        Path(f"adapters/{RUN}/extra.bin").write_bytes(b"\x80\x04.")
        said = "holds a pickle"
    assert serve.main(["--config", "c.yaml", "--port", str(free_port()), *flags]) == code
    captured = capfd.readouterr()
    assert said in captured.err and f"exit code {code}" in captured.err and "Traceback" not in captured.err


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.7"])
def test_beyond_this_machine_only_with_a_key(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.delenv(serve.KEY, raising=False)
    with pytest.raises(RefusedError, match="everyone on the network") as caught:
        serve.check_address(address)
    assert serve.KEY in caught.value.hint
    monkeypatch.setenv(serve.KEY, "")
    with pytest.raises(RefusedError):
        serve.check_address(address)
    monkeypatch.setenv(serve.KEY, KEY)
    assert serve.check_address(address) == address


def test_names_of_this_machine_are_addresses_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve.KEY, raising=False)
    assert serve.check_address("localhost") == serve.check_address("127.0.0.1") == "127.0.0.1"
    for wrong in ("", "example.com", "1.2.3", "*"):
        with pytest.raises(UserError, match="not an address"):
            serve.check_address(wrong)


def test_missing_packages_and_engines_are_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    code, error = refused(capsys, "--engine", "vllm")
    assert code == 4 and "vLLM is not installed" in error
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else name)
    code, error = refused(capsys)
    assert code == 4 and "uvicorn" in error and "EXTRAS=serve" in error


# --- what the engine is given


def test_the_served_folder_says_the_same_ids_as_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine renders with the tokenizer's own template; the run's prompts are made by ours."""
    from transformers import AutoTokenizer

    from scripts.utils.speaking import ids_of

    enter_run(tmp_path, monkeypatch, style=True)
    found = trained.find_trained(RUN)
    served.prepare(found, tmp_path / "served" / RUN, InferSection())
    loaded = trained.load_trained(RUN)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "served" / RUN)
    talk: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    for question, answer in CHATS:
        talk.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
        assert list(ids) == ids_of(loaded, talk)
        talk.append({"role": "assistant", "content": answer})
    values = json.loads((tmp_path / "served" / RUN / "generation_config.json").read_text())
    assert values["eos_token_id"] == loaded.stop_ids


def test_a_learnt_end_token_is_served(run: Path) -> None:
    Path(f"adapters/{RUN}/generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert served.end_tokens(trained.find_trained(RUN)) == trained.load_trained(RUN).stop_ids == [2, 7, 9]


def test_a_model_without_a_template_is_served_with_the_one_it_was_trained_with(run: Path) -> None:
    from transformers import AutoTokenizer

    for path in Path(f"adapters/{RUN}").glob("chat_template*"):
        path.unlink()
    values = json.loads(Path(f"adapters/{RUN}/tokenizer_config.json").read_text())
    values.pop("chat_template", None)
    Path(f"adapters/{RUN}/tokenizer_config.json").write_text(json.dumps(values))
    served.prepare(trained.find_trained(RUN), run / "served" / RUN, InferSection())
    plain = (chat.TEMPLATES / "plain.jinja").read_text()
    assert AutoTokenizer.from_pretrained(run / "served" / RUN).chat_template == plain


def test_vllm_is_asked_for_the_run_by_its_name_and_the_key_stays_off_its_command_line(run: Path) -> None:
    question = engine_child.Question(RUN, "tuned", "vllm", "127.0.0.1", 8000, str(run), {})
    adapter = Path(f"adapters/{RUN}").absolute()
    words = engine_child.vllm_command(question, "bfloat16", adapter, trained.find_trained(RUN))
    assert words[:3] == ["vllm", "serve", RUN] and f"{RUN}={adapter}" in words
    assert words[words.index("--max-lora-rank") + 1] == "32"
    assert "--api-key" not in words


def test_the_example_that_is_shown_sends_the_system_message_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    """As a shell reads it, whatever the message holds."""
    question = Question("try1", "tuned", "transformers", "127.0.0.1", 8000, "", {})
    system = 'It\'s "short" & $HOME\nand über'
    serve.announce(question, system)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " curl " in line]
    body = json.loads(shlex.split(line[line.index("curl ") :])[-1])
    assert body["messages"] == [{"role": "system", "content": system}, {"role": "user", "content": "Hello"}]
    serve.announce(question, None)
    assert '"system"' not in capsys.readouterr().out
