"""Strangers may supply data, models, adapters, checkpoints and names: nothing of theirs runs, escapes or is believed."""

import itertools
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.utils import adapters, checkpoints, config, files, model_store, stamp, trained
from scripts.utils.errors import RefusedError, SFTError, UserError
from tests.test_resume import EACH, cut
from tests.test_train import RUN, run_steps


class Canary:
    """A pickle that leaves a file behind when it is loaded by anything that runs what pickles say."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"echo sung > '{self.path}'",))


def plant(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps(Canary(canary)))


def test_the_canary_sings_when_it_is_loaded(tmp_path: Path) -> None:
    plant(tmp_path / "x.pkl", tmp_path / "canary")
    pickle.loads((tmp_path / "x.pkl").read_bytes())
    assert (tmp_path / "canary").exists()


IN_CHECKPOINT = [
    "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "training_args.bin", "adapter_model.bin", "pytorch_model.bin",
    "model.ckpt", "state.pkl", "adapter_model.safetensors", "training_state.safetensors", "training_state.json",
    "trainer_state.json",
]  # fmt: skip
IN_ADAPTER = ["adapter_model.bin", "pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pth", "x.pkl"]
IN_BASE = ["pytorch_model.bin", "model.safetensors", "pytorch_model-00001-of-00001.bin"]


def seal_adapter(folder: Path, run: str) -> None:
    """Seal an adapter's folder again, and make the stamp agree, as a stranger who passes on a whole project could."""
    manifest = files.read_json(folder / adapters.MANIFEST)
    manifest["files"] = checkpoints.hashes(folder, but=adapters.MANIFEST)
    files.write_json(folder / adapters.MANIFEST, manifest)
    facts = stamp.require(run)
    facts["result"]["export"] = files.sha256_json(manifest["files"])
    stamp.write(run, facts)


@pytest.mark.slow
def test_no_planted_pickle_is_ever_run(project: Callable[..., Path], tiny_model: Path) -> None:
    """In checkpoints, adapters and base models, with every manifest made to agree: refused, and the canary is silent."""
    folder = project(max_steps=4)
    canary = folder / "canary"
    run_steps(overrides=EACH)
    combinations = 0
    for name in IN_CHECKPOINT:
        cut(RUN, "cut", 3)
        target = Path("outputs/cut/checkpoint-3")
        plant(target / name, canary)
        identity = checkpoints.identity_in(target)
        (target / checkpoints.SEAL).unlink()
        checkpoints.seal(target, identity)
        try:
            run_steps(overrides=f"{EACH} run.name=cut")
            assert stamp.require("cut")["starts"][-1]["from_step"] == 2, name
        except RefusedError:
            assert not (Path("adapters") / "cut").exists()
        assert not canary.exists(), name
        combinations += 1
        shutil.rmtree("outputs/cut")
        shutil.rmtree("adapters/cut", ignore_errors=True)
    whole = folder / "whole"
    shutil.copytree(Path("adapters") / RUN, whole)
    for name, instead in itertools.product(IN_ADAPTER, (False, True)):
        target = Path("adapters") / RUN
        plant(target / name, canary)
        if instead:
            (target / "adapter_model.safetensors").unlink()
        seal_adapter(target, RUN)
        with pytest.raises(RefusedError):
            trained.load_trained(RUN)
        with pytest.raises(RefusedError):
            run_steps(overrides=f"run.name=next tuning.init_adapter={RUN}")
        assert not canary.exists(), name
        combinations += 2
        shutil.rmtree(target)
        shutil.copytree(whole, target)
        seal_adapter(target, RUN)
    for name in IN_BASE:
        base = folder / "base"
        shutil.copytree(tiny_model, base)
        (base / "model.safetensors").unlink()
        plant(base / name, canary)
        with pytest.raises(SFTError):
            model_store.resolve(str(base))
        assert not canary.exists(), name
        combinations += 1
        shutil.rmtree(base)
    assert combinations >= 20


def hostile_names() -> list[str]:
    """500 names: ways up, roots, devices, control characters, shell and template code, look-alikes, lengths."""
    parts = [
        "..", "../..", "/", "//", "/etc", "~", "~root", ".", "./", "...", "..\\", "\\\\host\\share", "C:\\", "con:", "a/b", "a\\b",
        "\x00", "a\x00b", "\n", "a\nb", "\r", "\t", " ", " a", "a ", "\x7f", "\u202e", "\u2215", "\uff0f", "．．", "%2e%2e%2f", "$HOME",
        "$(id)", "`id`", ";id", "|id", "&id", "{{7*7}}", "<b>", "'", '"', "*", "?", "[a]", "-rf", "--help", "", "\ud800", "é",
    ]  # fmt: skip
    dice = random.Random(0)
    names = {*parts, "a" * 101, "a" * 5000, "a/../../b", "outputs/../..", ".git", ".lock", ".hidden"}
    while len(names) < 500:
        names.add("".join(dice.choice([*parts, "a", "run", "1"]) for _ in range(dice.randint(2, 5))))
    return sorted(names)


def test_no_hostile_name_leaves_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "project"
    inside.mkdir()
    monkeypatch.chdir(inside)
    (inside / "c.yaml").write_text("{}")
    names = hostile_names()
    refused = 0
    for name in names:
        for place in (
            stamp.run_folder,
            stamp.adapter_folder,
            lambda n: Path("data/rendered") / config.data_name(of(n)),
        ):
            try:
                path = place(name)
            except UserError as error:
                assert error.hint
                refused += 1
            else:
                resolved = (inside / path).resolve()
                assert resolved.is_relative_to(inside) and len(resolved.relative_to(inside).parts) in (2, 3), name
    assert len(names) == 500 and refused > 1400
    assert sorted(p.name for p in tmp_path.iterdir()) == ["project"]
    assert sorted(p.name for p in inside.iterdir()) == ["c.yaml"]


def of(name: str) -> Any:
    from scripts.utils.schema import Config, DataSection

    return Config(data=DataSection(name=name or "/"))


def test_hostile_file_names_become_harmless_data_names() -> None:
    from scripts.utils.schema import Config, DataSection

    for name in hostile_names():
        found = config.data_name(Config(data=DataSection(raw=f"data/raw/{name}")))
        assert files.check_name(found, "data name") == found


@pytest.mark.parametrize(
    "folder", ["data/processed/sums", "data/rendered/sums", "data/processed_with_style/sums", f"adapters/{RUN}"]
)
def test_nothing_is_deleted_that_no_step_made(project: Callable[..., Path], folder: str) -> None:
    project(max_steps=1)
    mine = Path(folder) / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(RefusedError, match="no step wrote it"):
        run_steps(overrides="style.text=brief")
        from scripts import style
        from scripts.utils.config import load_config

        style.work(
            style.build_parser().parse_args(["--config", "tiny.yaml"]), load_config("tiny.yaml", "style.text=brief")
        )
    assert mine.read_text() == "mine"


def test_rotation_leaves_a_checkpoint_folder_without_our_seal_alone(tmp_path: Path) -> None:
    from tests.test_checkpoints import make

    run = tmp_path / "run"
    (run / "checkpoint-0").mkdir(parents=True)
    (run / "checkpoint-0" / "mine.txt").write_text("mine")
    for step in (1, 2, 3):
        make(run, step)
    checkpoints.rotate(run, keep=1, best=None)
    assert [f.name for f in checkpoints.listed(run)] == ["checkpoint-3", "checkpoint-0"]


def test_an_alias_bomb_in_a_config_is_refused_before_it_expands(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match="alias|anchor"):
        config.load_config(path)


def test_torch_is_new_enough_for_loading_what_others_wrote() -> None:
    """Before 2.10, torch.load with weights_only could be made to run code."""
    import torch

    assert tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 10)
    needed = [
        line
        for line in (files.REPO_ROOT / "pyproject.toml").read_text().splitlines()
        if line.strip().startswith('"torch>=')
    ]
    assert len(needed) == 1 and '"torch>=2.10"' in needed[0]


def test_nothing_in_the_project_loads_a_pickle_or_runs_remote_code() -> None:
    for path in (files.REPO_ROOT / "scripts").rglob("*.py"):
        text = path.read_text()
        for word in ("torch.load", "pickle.load", "import pickle", "trust_remote_code=True", "weights_only=False"):
            assert word not in text, (path, word)


def test_json_of_a_checkpoint_cannot_name_code(tmp_path: Path) -> None:
    """The training state knows dicts, lists, tuples, numbers, text and tensors, and nothing that could be called."""
    from scripts.utils import training_state

    training_state.save(tmp_path, {"a": (1, 2.5, None), 3: [True, "x"]})
    assert training_state.load(tmp_path) == {"a": (1, 2.5, None), 3: [True, "x"]}
    for value in ({"$call": "os.system"}, {"$array": [1], "dtype": "object; import os"}, {"$tensor": "nowhere"}, "{"):
        (tmp_path / training_state.TREE).write_text(
            value if isinstance(value, str) else json.dumps({"$dict": [["a", value]]})
        )
        with pytest.raises(RefusedError):
            training_state.load(tmp_path)
