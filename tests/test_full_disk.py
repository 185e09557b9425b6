"""A disk that another program fills up while a model is being written: one message, and what was there stays."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts import export_gguf, export_ollama
from scripts import merge as merge_step
from scripts.utils import files, gguf_proof, merging
from tests.test_train import mounted
from tests.tiny_models import RUN, enter_run

pytestmark = pytest.mark.slow  # each test runs whole steps

FOLDER = Path(f"outputs/{RUN}")


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """A run on a small disk; the result leaves only so many bytes free once a step has seen that there is room."""
    small = tmp_path / "small"
    if not mounted(small, "400m"):
        pytest.skip("a small file system cannot be mounted here")
    enter_run(small, monkeypatch)

    def fill(room: int) -> None:
        (small / "filler").unlink(missing_ok=True)
        if room >= 0:
            with (small / "filler").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small).free - room)

    yield fill
    os.chdir(tmp_path)
    subprocess.run(["umount", "-l", str(small)])


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): files.sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def fails_in_the_middle(
    start: Callable[[], int],
    module: object,
    fill: Callable[[int], None],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rooms: tuple[int, ...],
) -> None:
    """With each of ``rooms`` bytes left, ``start`` ends with 4 and ``folder`` is as it was; with room, it ends well."""
    before, check = contents(folder), module.check_space  # type: ignore[attr-defined]
    assert before
    for room in rooms:

        def then_full(*arguments: object, room: int = room) -> None:
            check(*arguments)
            fill(room)

        with monkeypatch.context() as patch:
            patch.setattr(module, "check_space", then_full)
            capsys.readouterr()
            assert start() == 4, room
        error = capsys.readouterr().err
        assert "the disk is full" in error and "small" in error and "Traceback" not in error
        fill(-1)
        assert contents(folder) == before, room
    assert start() == 0
    left = [path.name for path in FOLDER.iterdir() if path.name.startswith(".") and path.name != ".merge.lock"]
    assert not left


@pytest.mark.parametrize("by_layer", ["true", "false"])
def test_a_merge_leaves_the_earlier_model(
    filled: Callable[[int], None], by_layer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def merge() -> int:
        return merge_step.main(["--config", "c.yaml", "--force", "--set", f"merge.by_layer={by_layer}"])

    assert merge() == 0
    size = (FOLDER / "merged/model.safetensors").stat().st_size
    fails_in_the_middle(
        merge, merging, filled, FOLDER / "merged", monkeypatch, capsys, (0, 4096, size // 2, size + 4096)
    )


def test_an_export_leaves_the_earlier_file(
    filled: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge_step.main(["--config", "c.yaml"]) == 0

    def export() -> int:
        return export_gguf.main(["--config", "c.yaml", "--quant", "f32", "--force"])

    assert export() == 0
    size = (FOLDER / f"gguf/{RUN}-f32.gguf").stat().st_size
    fails_in_the_middle(export, gguf_proof, filled, FOLDER / "gguf", monkeypatch, capsys, (0, 4096, size // 2))


def test_a_modelfile_leaves_the_earlier_one(filled: Callable[[int], None], capsys: pytest.CaptureFixture[str]) -> None:
    assert merge_step.main(["--config", "c.yaml"]) == 0
    assert export_ollama.main(["--config", "c.yaml"]) == 0
    before = contents(FOLDER / "ollama")
    filled(0)
    assert export_ollama.main(["--config", "c.yaml"]) == 4
    assert "the disk is full" in capsys.readouterr().err
    filled(-1)
    assert contents(FOLDER / "ollama") == before
