"""Workers: results in order, errors whole, and no process left behind, however the step ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts import process, render, style
from scripts.utils import environment, workers
from scripts.utils.errors import MachineError, UserError
from scripts.utils.files import REPO_ROOT

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


def test_results_come_in_the_order_of_the_chunks() -> None:
    def work(number: int) -> tuple[int, int]:
        time.sleep(0.02 * (number % 3))
        return number, os.getpid()

    done = list(workers.in_order(work, range(20), processes=3))
    assert [number for number, _ in done] == list(range(20))
    if sys.platform == "linux":
        assert os.getpid() not in {process for _, process in done}


@pytest.mark.parametrize(("chunks", "processes"), [([1], 2), ([], 2), ([1, 2, 3], 1)])
def test_little_work_is_done_here(chunks: list[int], processes: int) -> None:
    assert list(workers.in_order(lambda _: os.getpid(), chunks, processes)) == [os.getpid()] * len(chunks)


@given(count=st.integers(0, 40), size=st.integers(1, 9))
def test_batches_hold_everything_once_with_their_numbers(count: int, size: int) -> None:
    found = list(workers.numbered(range(count), size))
    assert [item for _, batch in found for item in batch] == list(range(count))
    assert all(first == batch[0] + 1 and len(batch) <= size for first, batch in found)


@linux
def test_an_error_in_a_worker_arrives_with_its_hint() -> None:
    def work(number: int) -> int:
        if number == 3:
            raise UserError("wrong", "mend it")
        return number

    with pytest.raises(UserError) as caught:
        list(workers.in_order(work, range(9), processes=2))
    assert (caught.value.message, caught.value.hint, caught.value.exit_code) == ("wrong", "mend it", 2)


@linux
def test_a_worker_that_is_killed_is_an_error_and_never_a_hang() -> None:
    def work(number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(MachineError, match="a worker process was ended"):
        list(workers.in_order(work, range(9), processes=2))


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import os, sys, time\n"
        "from scripts.utils import workers\n"
        "def work(n):\n    open(sys.argv[1] + f'/{os.getpid()}', 'w').close(); time.sleep(0.3)\n"
        "for _ in workers.in_order(work, range(1000), processes=2): pass\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=REPO_ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    children = [int(path.name) for path in tmp_path.iterdir()]
    assert len(children) == 2
    parent.send_signal(number)
    assert parent.wait(timeout=30) != 0
    while any(map(_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, children))


ROWS = [{"question": f"What is {n}?", "answer": f"It is {n}, \u00e9{n % 7}."} for n in range(300)]
ROWS += [ROWS[3], {"question": "q"}, {"question": "q", "answer": "\ud800", "extra": 1}, {"question": ROWS[4]["question"], "answer": "other", "note": "x"}]  # fmt: skip


def _written(
    step_main: Callable[[list[str]], int], folder: str, count: int, monkeypatch, *more: str
) -> dict[str, bytes]:
    monkeypatch.setattr(workers, "cores", lambda: count)
    assert step_main(["--config", "run.yaml", *more]) == 0
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "manifest.json"}


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_one_core_and_three_write_the_same_files(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "prepare", lambda root: None)
    monkeypatch.chdir(tmp_path)
    if kind == "csv":
        lines = [f'"{row["question"]}","{row.get("answer", "")}"\n' for row in ROWS if row.get("answer") != "\ud800"]
        Path("rows.csv").write_text("question,answer\n" + "".join(lines))
    elif kind == "json":
        Path("rows.json").write_text(json.dumps(ROWS))
    else:
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("run.yaml").write_text(
        f"data: {{name: set, raw: rows.{kind}, max_rejected: 0.5}}\nmodel: {{name: {tiny_model}}}\nstyle: {{text: Be brief.}}\n"
    )
    steps = {"data/processed/set": process.main, "data/processed_with_style/set": style.main, "data/rendered/set": render.main}  # fmt: skip
    for folder, step in steps.items():
        one = _written(step, folder, 1, monkeypatch, "--force")
        said = capfd.readouterr()
        three = _written(step, folder, 3, monkeypatch, "--force")
        assert one == three and len(one["train.jsonl"].splitlines()) > 128, folder
        assert capfd.readouterr() == said


def test_what_is_wrong_late_in_a_file_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "prepare", lambda root: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workers, "cores", lambda: 3)
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS[:250]]
    Path("rows.jsonl").write_bytes(b"".join(lines) + b'{"question": "\xe9"}\n')
    Path("run.yaml").write_text("data: {name: set, raw: rows.jsonl}\n")
    assert process.main(["--config", "run.yaml"]) == 2
    assert "rows.jsonl:251: not UTF-8: byte 0xe9" in capfd.readouterr().err
    assert list(Path("data/processed").iterdir()) == []


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", ["process", "style"])
def test_a_step_that_is_stopped_leaves_the_old_rows_and_no_half_ones(
    step: str, number: signal.Signals, tmp_path: Path
) -> None:
    def command(name: str) -> list[str]:
        more = ["--style", "Be brief."] if name == "style" else []
        return [sys.executable, str(REPO_ROOT / "scripts" / f"{name}.py"), "--config", "run.yaml", *more]

    def held() -> dict[Path, bytes]:
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    lines = [json.dumps({"question": f"What is {n}?", "answer": f"It is {n}."}) + "\n" for n in range(20_000)]
    (tmp_path / "run.yaml").write_text("data: {name: set, raw: rows.jsonl}\n")
    (tmp_path / "rows.jsonl").write_text("".join(lines[:300]))
    folder = tmp_path / ("data/processed" if step == "process" else "data/processed_with_style")
    quiet: dict[str, Any] = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for name in ("process", "style"):
        subprocess.run(command(name), check=True, **quiet)
    before = held()
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    if step == "style":
        subprocess.run(command("process"), check=True, **quiet)
    started = subprocess.Popen(command(step), **quiet)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in folder.glob(".*.new/*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    started.send_signal(number)
    assert started.wait(timeout=30) == 128 + number
    assert held() == before


_STOPPED_WHILE_STARTING = """
import os, signal, sys
from concurrent.futures import process
from scripts.utils import workers

class Stopped(BaseException):
    pass

def stop(*_):
    raise Stopped

signal.signal(signal.SIGTERM, stop)
real = process.ProcessPoolExecutor._spawn_process

def spawn(self):
    real(self)
    os.kill(os.getpid(), signal.SIGTERM)  # the first worker is there, the others are not

process.ProcessPoolExecutor._spawn_process = spawn
try:
    list(workers.in_order(lambda number: number, range(9), processes=2))
except Stopped:
    print("stopped")
"""


@linux
def test_a_signal_while_the_workers_start_leaves_none_to_wait_for() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _STOPPED_WHILE_STARTING], cwd=REPO_ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr
