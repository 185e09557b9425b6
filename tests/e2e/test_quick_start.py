"""The first command of the README, as a newcomer types it: a clone, nothing asked, a tuned model with honest numbers."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, environment


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git would clone, and what it does not know yet but does not ignore either."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run(["git", "add", "--all"], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def active(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An active environment for the clone alone; the packages of this one are there already."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    outer = [path for path in sys.path if path.endswith("site-packages")]
    (site / "outer.pth").write_text("".join(f"{path}\n" for path in outer))
    return folder


def quick_start(clone: Path, active: Path) -> subprocess.CompletedProcess[str]:
    # the model is fetched once for all tests
    variables = environment(VIRTUAL_ENV=str(active), SFT_MODEL_CACHE=str(ROOT / ".cache" / "models"))
    return subprocess.run(
        ["./workflows/quick_start.sh", "--yes"],
        cwd=clone,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1400,
    )


@pytest.fixture(scope="module")
def first(clone: Path, active: Path) -> subprocess.CompletedProcess[str]:
    return quick_start(clone, active)


def metrics(clone: Path) -> dict:
    (path,) = clone.glob("outputs/*/eval/metrics.json")
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_one_command_makes_a_model_that_does_what_the_base_cannot(clone, first):
    assert first.returncode == 0, first.stdout[-5000:]
    found = metrics(clone)
    assert found["settings"]["rows"] >= 50
    assert found["base"]["exact_match"] <= 0.05
    assert found["tuned"]["exact_match"] >= 0.85
    assert found["tuned"]["loss"] < found["base"]["loss"]


@pytest.mark.slow
def test_it_ends_with_the_table_where_all_lies_and_what_to_type_next(clone, first):
    end = first.stdout[first.stdout.rindex("\neval\n") :]
    (row,) = [line for line in end.splitlines() if line.strip().lower().startswith("exact match")]
    numbers = re.findall(r"[\d.]+", row)
    found = metrics(clone)
    assert [float(n) for n in numbers[:2]] == pytest.approx(
        [100 * found[w]["exact_match"] for w in ("base", "tuned")], abs=0.06
    )
    for place in re.findall(r"(?:adapters|outputs)/[\w.-]+(?:/eval)?", end):
        assert (clone / place).exists(), place
    commands = re.findall(r"^  (make .*?)(?:\s+#.*)?$", end, flags=re.M)
    assert len(commands) == 3
    for command in commands:
        done = subprocess.run(
            ["make", "-n", *command.split()[1:]], cwd=clone, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert "\x1b[" not in first.stdout  # no colours off a terminal


@pytest.mark.slow
def test_asked_as_its_end_suggests_it_does_what_it_was_trained_for(clone, active, first):
    """The rows brought their system message along; nobody who asks has to know it."""
    variables = environment(
        VIRTUAL_ENV=str(active), SFT_MODEL_CACHE=str(ROOT / ".cache" / "models"), PROMPT="Please cancel order 6182."
    )
    done = subprocess.run(
        ["make", "infer", "RUN=quickstart-sample"], cwd=clone, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "system message, as in training: Extract intent" in done.stderr
    answer = json.loads(done.stdout)
    assert (answer["intent"], answer["order"]) == ("cancel", "6182")


@pytest.mark.slow
def test_it_leaves_nothing_that_git_would_see(clone, first):
    status = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True)
    assert [line for line in status.stdout.splitlines() if not line.startswith("A ")] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_run_reuses_what_is_there_and_shows_the_table_again(clone, active, first):
    before = {path: path.stat().st_mtime_ns for path in clone.glob("adapters/*/*")}
    again = quick_start(clone, active)
    assert again.returncode == 0, again.stdout[-5000:]
    assert "already finished" in again.stdout
    assert "exact match" in again.stdout.lower()
    assert {path: path.stat().st_mtime_ns for path in clone.glob("adapters/*/*")} == before


@pytest.mark.slow
def test_a_failing_step_is_named_with_its_log_and_its_own_exit_code(clone, active, first):
    variables = environment(VIRTUAL_ENV=str(active), SFT_SET="train.lrr=1")
    done = subprocess.run(
        ["./workflows/quick_start.sh"],
        cwd=clone,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "train.learning_rate" in done.stdout
    log = re.findall(r"log is (\S+)", done.stderr)[0].rstrip(";")
    assert "train.learning_rate" in (clone / log).read_text()
    assert done.stderr.splitlines()[-1] == "quick_start: exit code 2"
