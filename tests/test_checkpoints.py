"""Checkpoints: whole or not there, verified before they are trusted, never deleted while they are needed."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from scripts.utils import checkpoints


def make(run: Path, step: int) -> Path:
    run.mkdir(exist_ok=True)
    with checkpoints.landing(run, step) as staging:
        folder = staging / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 4)
        (folder / "training_state.json").write_bytes(b"state" * 100)
        (folder / "trainer_state.json").write_text("{}")
    return run / f"checkpoint-{step}"


def test_a_sealed_checkpoint_verifies(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", 3)
    assert checkpoints.damage(folder) is None
    assert checkpoints.newest_whole(tmp_path / "run") == (folder, [])


def damage_empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def damage_flip(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def damage_truncate(folder: Path) -> None:
    path = folder / "training_state.json"
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "emptied": damage_empty,
    "bit flipped": damage_flip,
    "truncated": damage_truncate,
    "file removed": lambda folder: (folder / "training_state.json").unlink(),
    "seal removed": lambda folder: (folder / checkpoints.SEAL).unlink(),
    "seal damaged": lambda folder: (folder / checkpoints.SEAL).write_text("{"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over_and_named_and_kept(tmp_path: Path, name: str) -> None:
    older, newest = make(tmp_path / "run", 1), make(tmp_path / "run", 2)
    DAMAGES[name](newest)
    found, passed_over = checkpoints.newest_whole(tmp_path / "run")
    assert found == older
    assert len(passed_over) == 1 and "checkpoint-2" in passed_over[0]
    assert newest.exists()


def test_a_save_that_fails_leaves_no_checkpoint_and_no_rest(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ValueError, match="half way"), checkpoints.landing(run, 4) as staging:
        (staging / "checkpoint-4").mkdir()
        (staging / "checkpoint-4" / "half").write_text("x")
        raise ValueError("half way")
    assert list(run.iterdir()) == []


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folders = [make(run, step) for step in (1, 2, 3, 4)]
    checkpoints.rotate(run, keep=2, best=folders[0])
    assert [f.name for f in checkpoints.listed(run)] == ["checkpoint-4", "checkpoint-1"]


def test_rotation_keeps_of_those_in_between_only_the_newest(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folders = [make(run, step) for step in (10, 13, 20, 23, 26)]

    def rotated(**words: Any) -> list[int]:
        checkpoints.rotate(run, in_between=lambda step: step % 10 != 0, **words)
        return [checkpoints.step_of(folder) for folder in checkpoints.listed(run)]

    assert rotated(keep=9, best=folders[1]) == [26, 20, 13, 10]
    assert rotated(keep=9, best=None) == [26, 20, 10]
    make(run, 30)
    assert rotated(keep=2, best=None) == [30, 20]


def test_rotation_deletes_nothing_while_the_newest_is_damaged(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folders = [make(run, step) for step in (1, 2, 3)]
    damage_flip(folders[2])
    checkpoints.rotate(run, keep=1, best=None)
    assert len(checkpoints.listed(run)) == 3


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (9, 100, 20):
        make(run, step)
    (run / "checkpoint-x").mkdir()
    assert [checkpoints.step_of(f) for f in checkpoints.listed(run)] == [100, 20, 9]
    shutil.rmtree(run)
