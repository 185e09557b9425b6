"""install.sh: into the active environment, wheels by the pinned versions, quick when nothing changed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, environment, run

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
