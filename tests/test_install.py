"""install.sh: into the active environment, wheels by the pinned versions, quick when nothing changed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, environment, run
from tests.planted import nvidia_smi

INSTALL = "env/install.sh"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What install.sh needs of the repository, in a folder with a space in its name."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("pyproject.toml", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").write_text("# SFT-Play\n")
    shutil.copytree(ROOT / "env", folder / "env")
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def layered(tmp_path: Path) -> Path:
    """An environment of its own in which this one's packages are there already: installing needs no download of torch."""
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    outer = [path for path in sys.path if path.endswith("site-packages")]
    (site / "outer.pth").write_text("".join(f"{path}\n" for path in outer))
    return folder


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SFT_EXTRAS": "dve"}, "unknown extra dve"),
        ({"SFT_TORCH": "gpu"}, "TORCH=gpu"),
        ({"SFT_EXTRAS": "dev,--user"}, "--user"),
    ],
)
def test_what_is_not_known_is_refused_before_anything_is_made(clone, variables, said):
    done = subprocess.run(
        [INSTALL], cwd=clone, env={**environment(**variables), "VIRTUAL_ENV": ""}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.splitlines()[-1] == "install: exit code 2"
    assert not (clone / ".venv").exists()


def test_a_machine_without_a_fitting_python_is_told_so(clone, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "uname", "cat", "cksum", "tr", "sed", "sort", "date", "head"):
        (tools / name).symlink_to(shutil.which(name) or name)
    (tools / "python3").write_text('#!/bin/bash\n[ "$1" = --version ] && echo Python 3.9.1 && exit\nexit 1\n')
    (tools / "python3").chmod(0o755)
    done = subprocess.run(
        [INSTALL], cwd=clone, env={"PATH": str(tools), "HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 4, done.stderr
    assert "Python 3.9.1" in done.stderr and "PYTHON=" in done.stderr


def test_if_missing_does_nothing_where_the_steps_can_run(clone):
    done = run([INSTALL, "--if-missing"], clone)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_it_installs_into_the_active_environment_and_a_second_time_is_quick(clone, layered):
    done = run(["make", "install"], clone, VIRTUAL_ENV=str(layered))
    assert done.returncode == 0, done.stderr
    assert "done in" in done.stderr
    assert (layered / "bin" / "sft-train").is_file()
    assert not (clone / ".venv").exists()
    where = run([layered / "bin" / "python", "-c", "import scripts; print(scripts.__file__)"], layered)
    assert Path(where.stdout.strip()).parent.parent == clone
    again = run(["make", "install"], clone, VIRTUAL_ENV=str(layered))
    assert again.returncode == 0
    assert "up to date" in again.stderr
    # other pins, other state
    with (clone / "env" / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert "up to date" not in run([INSTALL], clone, VIRTUAL_ENV=str(layered)).stderr


UV = """#!/bin/bash
# stands for uv: notes what it is asked, makes environments, and fetches nothing
printf '%s\\n' "$*" >>"$UV_CALLS"
if [ "$1" = venv ]; then exec python3 -m venv --without-pip "${@: -1}"; fi
case "$*" in *"-e ."*) exit "${UV_ENDS:-0}" ;; esac
"""


@pytest.fixture
def uv(tmp_path: Path):
    """Run install.sh in a clone with a uv that fetches nothing; returns what it was asked."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "uv").write_text(UV)
    (tools / "uv").chmod(0o755)

    def install(
        clone: Path, *, gpu: bool = False, **variables: str
    ) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        if gpu:
            nvidia_smi(tools)
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        base = {"VIRTUAL_ENV": "", "CONDA_PREFIX": "", "PATH": path, "UV_CALLS": str(calls)}
        done = run([INSTALL], clone, **{**base, **variables})
        return done, calls.read_text().splitlines()

    return install


def plant(environment_folder: Path, *names: str) -> Path:
    (site,) = environment_folder.glob("lib/python3*/site-packages")
    for name in names:
        (site / name).mkdir()
    return site


def test_force_makes_the_environment_anew_and_leaves_the_old_one_where_that_fails(clone, uv):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", clone / ".venv"], check=True)
    (clone / ".venv" / "mine").touch()
    done, calls = uv(clone, SFT_FORCE="1", UV_ENDS="1")
    assert done.returncode == 4 and "cannot be installed" in done.stderr
    assert (clone / ".venv" / "mine").exists()  # what worked before is back
    assert any(call.startswith("venv") for call in calls)
    assert not (clone / ".cache" / "venv-before").exists()
    uv(clone, SFT_FORCE="1")  # here it ends well, but for the versions that it cannot tell
    assert not (clone / ".venv" / "mine").exists() and (clone / ".venv" / ".sft-play-installed").exists()
    assert not (clone / ".cache" / "venv-before").exists()


@pytest.mark.parametrize(
    ("gpu", "torch", "goes"),
    [(True, "auto", True), (False, "auto", False), (False, "cuda", True), (True, "cpu", False)],
)
def test_a_cpu_only_torch_makes_room_where_a_gpu_has_come(clone, uv, gpu, torch, goes):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", clone / ".venv"], check=True)
    plant(clone / ".venv", "torch-2.13.0+cpu.dist-info")
    _, calls = uv(clone, gpu=gpu, SFT_TORCH=torch)
    assert any("pip uninstall" in call and call.endswith(" torch") for call in calls) == goes
    assert any("+cpu" in call for call in calls) != goes  # the build that is fetched


def test_an_active_environment_is_emptied_by_force_and_not_removed(clone, uv, tmp_path):
    active = tmp_path / "active"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", active], check=True)
    (active / "mine").touch()
    _, calls = uv(clone, SFT_FORCE="1", VIRTUAL_ENV=str(active))
    assert (active / "mine").exists() and not (clone / ".venv").exists()
    assert any("pip uninstall" in call and "-r env/constraints.txt" in call for call in calls)
