"""The exported adapter: proven to load elsewhere, and refused when it is damaged, foreign, pickled or without effect."""

import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from scripts.utils import adapters, files, self_test, stamp, trained
from scripts.utils.errors import RefusedError, UserError
from tests.test_train import RUN, run_steps

pytestmark = pytest.mark.slow


def test_every_export_is_loaded_in_a_new_process_and_gives_the_same_loss(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for mode in ("lora", "qlora", "full"):
        project(max_steps=2, self_test=True)
        run_steps(overrides=f"run.name={mode} tuning.mode={mode}")
        error = capsys.readouterr().err
        assert "in a new process" in error and "was not tested" not in error
        assert stamp.require(mode)["result"]["export"]
        assert trained.load_trained(mode).kind == ("full" if mode == "full" else "adapter")


def test_an_export_that_is_not_what_was_trained_is_refused_and_the_old_one_stays(
    project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    project(max_steps=2, scheduler="constant", self_test=True)
    run_steps()
    before = files.sha256_file(Path("adapters") / RUN / "adapter_model.safetensors")
    original = adapters.save_weights

    def wrong(model: Any, folder: Path, whole: Any = None) -> None:
        original(model, folder, whole)
        if "checkpoint" not in str(folder):
            path = folder / "adapter_model.safetensors"
            save_file({name: value * 30 for name, value in load_file(path).items()}, path)

    monkeypatch.setattr(adapters, "save_weights", wrong)
    with pytest.raises(RefusedError, match="do not give the loss"):
        run_steps(overrides="train.max_steps=4")
    assert files.sha256_file(Path("adapters") / RUN / "adapter_model.safetensors") == before
    assert not [p for p in Path("adapters").iterdir() if p.name.startswith(".")]


def test_the_self_test_says_when_the_new_process_cannot_load(project: Callable[..., Path]) -> None:
    project(max_steps=1)
    run_steps()
    folder = Path("adapters") / RUN
    request = {"run": RUN, "folder": "adapters/nowhere", "ids": [1, 2, 3], "trained": [False, True, True]}
    with pytest.raises(RefusedError, match="missing|does not load"):
        self_test._ask(request)
    assert self_test._ask({**request, "folder": str(folder)})["loss"] > 0


def write(path: Path, **changes: Any) -> None:
    files.write_json(path, {**files.read_json(path), **changes})


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the weights and seal the folder again, as someone would who wants it to be loaded."""
    from safetensors.torch import load_file, save_file

    from scripts.utils import checkpoints

    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    manifest = files.read_json(folder / adapters.MANIFEST)
    manifest["files"] = checkpoints.hashes(folder, but=adapters.MANIFEST)
    files.write_json(folder / adapters.MANIFEST, manifest)
    facts = stamp.require(RUN)
    facts["result"]["export"] = files.sha256_json(manifest["files"])
    stamp.write(RUN, facts)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def to_pickle(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")


def renamed(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("layers.0", "layers.7"): value for name, value in tensors.items()}


WRONG: dict[str, Callable[[Path], Any]] = {
    "weights removed": lambda f: (f / "adapter_model.safetensors").unlink(),
    "weights empty": lambda f: (f / "adapter_model.safetensors").write_bytes(b""),
    "weights cut": lambda f: (f / "adapter_model.safetensors").write_bytes(
        (f / "adapter_model.safetensors").read_bytes()[:-40]
    ),
    "a bit flipped": lambda f: flip(f / "adapter_model.safetensors"),
    "settings removed": lambda f: (f / "adapter_config.json").unlink(),
    "settings damaged": lambda f: (f / "adapter_config.json").write_text("{"),
    "another alpha in the settings": lambda f: write(f / "adapter_config.json", lora_alpha=64),
    "another tokenizer": lambda f: flip(f / "tokenizer.json"),
    "another template": lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"),
    "manifest removed": lambda f: (f / adapters.MANIFEST).unlink(),
    "manifest damaged": lambda f: (f / adapters.MANIFEST).write_text("{}"),
    "a pickle beside it": to_pickle,
    "a pickle instead": lambda f: (to_pickle(f), (f / "adapter_model.safetensors").unlink()),
    "no keys at all, sealed again": lambda f: rewrite(f, lambda tensors: {}),
    "keys of other layers, sealed again": lambda f: rewrite(f, renamed),
    "half of the keys, sealed again": lambda f: rewrite(f, lambda t: dict(list(t.items())[: len(t) // 2])),
    "another shape, sealed again": lambda f: rewrite(f, lambda t: {n: v[:, :1].contiguous() for n, v in t.items()}),
    "no effect, sealed again": lambda f: rewrite(
        f, lambda t: {n: v * (0 if "lora_B" in n else 1) for n, v in t.items()}
    ),
    "NaN, sealed again": lambda f: rewrite(f, lambda t: {n: v * float("nan") for n, v in t.items()}),
    "another run's adapter": lambda f: (shutil.rmtree(f), shutil.copytree("adapters/other", f)),
}


def test_there_are_at_least_15_wrong_adapters() -> None:
    assert len(WRONG) >= 15


def test_every_wrong_or_damaged_adapter_is_refused(project: Callable[..., Path]) -> None:
    folder = project(max_steps=2)
    run_steps(overrides="run.name=other train.seed=3")
    run_steps()
    assert trained.load_trained(RUN).kind == "adapter"
    for part in ("outputs", "adapters"):
        shutil.copytree(folder / part, folder / "kept" / part, symlinks=True)
    for name, damage in WRONG.items():
        damage(Path("adapters") / RUN)
        with pytest.raises((RefusedError, UserError)) as caught:
            trained.load_trained(RUN)
        assert caught.value.hint, name
        assert isinstance(caught.value, RefusedError) or name == "settings removed", (name, caught.value)
        for part in ("outputs", "adapters"):
            shutil.rmtree(folder / part)
            shutil.copytree(folder / "kept" / part, folder / part, symlinks=True)


def test_another_base_model_under_the_same_name_is_refused(project: Callable[..., Path], tiny_model: Path) -> None:
    """A wrong base of the same shape would load without a word."""
    from tests.tiny_models import tiny_llama

    folder = project(max_steps=1)
    shutil.copytree(tiny_model, folder / "base")
    run_steps(overrides=f"model.name={folder / 'base'}")
    tiny_llama(seed=5).save_pretrained(folder / "base")
    with pytest.raises(RefusedError, match="is not the one this run was trained on"):
        trained.load_trained(RUN)


def test_a_damaged_or_lost_export_of_a_finished_run_is_made_anew_from_its_checkpoints(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    project(max_steps=2)
    run_steps()
    file = Path("adapters") / RUN / "adapter_model.safetensors"
    before = files.sha256_file(file)
    flip(file)
    run_steps()
    assert "exporting it once more" in capsys.readouterr().err and files.sha256_file(file) == before
    shutil.rmtree(file.parent)
    run_steps()
    assert files.sha256_file(file) == before


def test_a_folder_that_no_run_wrote_is_never_replaced(project: Callable[..., Path]) -> None:
    project(max_steps=1)
    mine = Path("adapters") / RUN / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(RefusedError, match="no step wrote it"):
        run_steps()
    assert mine.read_text() == "years of work"


def test_a_new_run_begins_with_the_adapter_of_another(project: Callable[..., Path]) -> None:
    from tests.test_train import losses

    project(max_steps=3, scheduler="constant", learning_rate=0.02)
    run_steps(overrides="run.name=first")
    run_steps(overrides="run.name=second tuning.init_adapter=first train.learning_rate=1e-9")
    run_steps(overrides="run.name=cold train.learning_rate=1e-9")
    assert losses("second")[1] < losses("cold")[1] - 0.05
    assert stamp.require("second")["tuning"]["init_adapter"] == "first"
    run_steps(overrides="run.name=folder tuning.init_adapter=adapters/first train.learning_rate=1e-9")
    assert losses("folder") == losses("second")


def test_an_adapter_that_does_not_fit_is_no_beginning(project: Callable[..., Path], tiny_model: Path) -> None:
    from tests.tiny_models import tiny_llama

    folder = project(max_steps=1)
    run_steps(overrides="run.name=first")
    for words, error, text in (
        ("tuning.init_adapter=nowhere", UserError, "neither a run"),
        ("tuning.init_adapter=first lora.r=8", UserError, "lora.r is 8"),
        ("tuning.init_adapter=first lora.alpha=3", UserError, "lora.alpha is 3"),
        ("tuning.init_adapter=first lora.target_modules=[q_proj]", RefusedError, "do not fit"),
        ("tuning.init_adapter=first tuning.mode=full", UserError, "trains none"),
    ):
        with pytest.raises(error, match=text):
            run_steps(overrides=f"run.name=second {words}")
    shutil.copytree(tiny_model, folder / "base")
    tiny_llama(seed=5).save_pretrained(folder / "base")
    with pytest.raises(RefusedError, match="another base model"):
        run_steps(overrides=f"run.name=second tuning.init_adapter=first model.name={folder / 'base'}")
    flip(Path("adapters/first/adapter_model.safetensors"))
    with pytest.raises(RefusedError, match="differs"):
        run_steps(overrides="run.name=second tuning.init_adapter=first")


def test_the_stamp_follows_its_schema_in_every_state(project: Callable[..., Path]) -> None:
    import jsonschema

    schema = json.loads((files.REPO_ROOT / "docs" / "backend.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    project(max_steps=2)
    states = ["", "tuning.mode=qlora", "tuning.mode=full"]
    if find_spec("unsloth") is None:  # where it is installed this process must not import it
        states.append("tuning.backend=unsloth")
    for number, words in enumerate(states):
        run_steps(overrides=f"run.name=r{number} {words}")
        facts = stamp.require(f"r{number}")
        jsonschema.validate(facts, schema)
        facts["starts"].append({"at": stamp.now(), "from_step": 1, "step": 1, "ended": "running"})
        jsonschema.validate({**{k: v for k, v in facts.items() if k != "result"}, "status": "running"}, schema)
        for name in schema["required"]:
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate({k: v for k, v in facts.items() if k != name}, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**facts, "surprise": 1}, schema)


def test_the_stamp_holds_no_secret_and_no_user_name(
    project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    folder = project(max_steps=1)
    home = folder / "home" / "ada-lovelace"
    shutil.copytree(tiny_model, home / "models" / "base")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MY_SERVICE_TOKEN", "t0ken-of-some-length")
    run_steps(overrides=f"model.name={home / 'models' / 'base'}")
    stamp.end(RUN, step=1, how="finished", extra="t0ken-of-some-length and hf_abcdefghijklmnopqrstuvwx")
    text = stamp.path_of(RUN).read_text()
    assert "ada-lovelace" not in text and "t0ken" not in text and "hf_abcdef" not in text
    assert stamp.require(RUN)["model"]["name"] == "~/models/base"
    card = (Path("adapters") / RUN / "README.md").read_text()
    assert "ada-lovelace" not in card
    assert "ada-lovelace" not in (Path("adapters") / RUN / "adapter_config.json").read_text()
    os.chdir(folder)
    assert trained.load_trained(RUN).kind == "adapter", "the home folder's ~ is found again"
