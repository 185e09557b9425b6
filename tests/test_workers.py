"""Workers: results in order, errors whole, and no process left behind, however the step ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.utils import workers
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
