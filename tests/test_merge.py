"""What merge promises: a model folder that answers as base plus adapter does, or none at all."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import infer
from scripts import merge as merge_step
from scripts.utils import files, merging, stamp
from tests.tiny_models import CHATS, RUN, enter_run

pytestmark = pytest.mark.slow  # each test runs a whole step of its own

MERGED = Path(f"outputs/{RUN}/merged")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter_run(tmp_path, monkeypatch)


def merge(*flags: str) -> int:
    return merge_step.main(["--config", "c.yaml", *flags])


def proof() -> dict[str, Any]:
    return files.read_json(MERGED / merge_step.NOTE)["proof"]


def answer_of_merged(capsys: pytest.CaptureFixture[str], question: str) -> str:
    capsys.readouterr()
    assert infer.main(["--config", "c.yaml", "--which", "merged", "--prompt", question]) == 0
    return capsys.readouterr().out


def test_the_merged_model_answers_as_the_adapter_does(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge() == 0
    out = capsys.readouterr().out
    assert "on average" in out and str(MERGED) in out
    assert proof()["mean_difference"] < 1e-4 < 0.5 < proof()["adapter_effect"]
    assert proof()["greedy_agreement"] == 1.0
    for question, answer in CHATS:
        assert answer_of_merged(capsys, question) == answer + "\n"


def test_the_merged_folder_is_complete_without_the_project(run: Path) -> None:
    """transformers alone loads it: weights without an adapter, tokenizer, template, end tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert merge() == 0
    shutil.rmtree("adapters")
    model = AutoModelForCausalLM.from_pretrained(MERGED)
    tokenizer = AutoTokenizer.from_pretrained(MERGED)
    assert not any("lora" in name for name in model.state_dict())
    assert 2 in model.generation_config.eos_token_id
    chat = [{"role": "user", "content": CHATS[0][0]}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True) == CHATS[0][1]


def test_a_qlora_adapter_is_merged_into_the_dequantised_weights_it_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter_run(tmp_path, monkeypatch, mode="qlora")
    assert merge() == 0
    assert "NF4" in capsys.readouterr().err
    assert proof()["mean_difference"] < 1e-3
    assert "quantization_config" not in files.read_json(MERGED / "config.json")
    assert answer_of_merged(capsys, CHATS[0][0]) == CHATS[0][1] + "\n"


@pytest.mark.parametrize(("dtype", "stored"), [("auto", "F32"), ("bf16", "BF16")])
def test_weights_are_saved_in_the_bases_precision_unless_the_config_says_otherwise(
    run: Path, dtype: str, stored: str
) -> None:
    from safetensors import safe_open

    # this tiny model's weights are far larger than a real one's, so rounding moves it further
    assert merge("--set", f"merge.dtype={dtype} merge.tolerance=1") == 0
    with safe_open(MERGED / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {stored}  # noqa: SIM118
    assert files.read_json(MERGED / "config.json")["dtype"] == {"F32": "float32", "BF16": "bfloat16"}[stored]


def test_a_merge_beyond_the_tolerance_is_refused_and_leaves_nothing(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = merging.merged

    def forgets_the_adapter(source: merging.Source, model: Any) -> Any:
        return real(source, model) and merging.load_causal_lm(
            source.base, precision=source.compute, device=source.device
        )

    monkeypatch.setattr(merging, "merged", forgets_the_adapter)
    assert merge() == 3
    err = capsys.readouterr().err
    assert "not the adapter model" in err and "merge.tolerance" in err
    assert not MERGED.exists()
    assert not list(MERGED.parent.glob(".merged*"))


def test_what_was_merged_before_stays_when_a_new_merge_is_refused(run: Path) -> None:
    assert merge() == 0
    before = files.sha256_file(MERGED / "model.safetensors")
    assert merge("--set", "merge.dtype=bf16 merge.tolerance=1e-9") == 3
    assert merge("--set", "merge.tolerance=1e-12") == 3, "an earlier merge does not pass a stricter tolerance"
    assert files.sha256_file(MERGED / "model.safetensors") == before


def test_merge_is_up_to_date_until_the_adapter_or_the_settings_change(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def again(*flags: str) -> bool:
        capsys.readouterr()
        assert merge(*flags) == 0
        return "up to date" not in capsys.readouterr().err

    assert again()
    assert not again()
    assert again("--force")
    (MERGED / "config.json").unlink()
    assert again()
    from safetensors.torch import load_file, save_file

    weights = Path(f"adapters/{RUN}/adapter_model.safetensors")
    save_file({name: value / 2 for name, value in load_file(weights).items()}, weights)
    assert again()


def test_a_fully_tuned_run_has_nothing_to_merge_and_says_where_it_lies(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = stamp.require(RUN)
    stamp.write(RUN, {**facts, "tuning": {"mode": "full"}})
    assert merge() == 2
    assert str(Path(f"adapters/{RUN}").absolute()) in capsys.readouterr().err


def test_a_missing_adapter_and_a_wrong_size_are_the_users_errors(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge("--set", "merge.shard_size=big") == 2
    assert "merge.shard_size" in capsys.readouterr().err
    shutil.rmtree(f"adapters/{RUN}")
    assert merge() == 2
    assert str(Path(f"adapters/{RUN}").absolute()) in capsys.readouterr().err


def test_another_base_model_than_the_stamps_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = stamp.require(RUN)
    facts["model"]["path_hash"] = "0" * 64
    stamp.write(RUN, facts)
    assert merge() == 3
    assert "not the one this run was trained on" in capsys.readouterr().err
    assert not MERGED.exists()


def test_without_rendered_rows_the_proof_uses_builtin_prompts_and_says_so(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("data")
    assert merge() == 0
    assert "built-in prompts" in capsys.readouterr().err


def test_an_adapter_smaller_than_the_rounding_is_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    merge_step.judge({"mean_difference": 0.01, "max_difference": 0.1, "adapter_effect": 0.012}, 0.05)
    assert "merge.dtype: fp32" in capsys.readouterr().err


def test_the_merged_model_loads_and_answers_where_there_is_no_peft(run: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('peft', 'bitsandbytes', 'scripts'):\n"
        "    sys.modules[name] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))\n"
        "chat = [{'role': 'user', 'content': sys.argv[2]}]\n"
        "ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors='pt')\n"
        "new = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids['input_ids'].shape[1] :]\n"
        "print(tokenizer.decode(new, skip_special_tokens=True))\n"
    )
    assert merge() == 0
    done = subprocess.run(
        [sys.executable, "-c", code, MERGED.absolute(), CHATS[0][0]], cwd="/", capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, CHATS[0][1] + "\n"), done.stderr


def test_a_disk_without_room_is_said_before_anything_is_written(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert merge() == 0
    before = files.sha256_file(MERGED / "model.safetensors")
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert merge("--force") == 4
    assert "are free" in capsys.readouterr().err
    assert files.sha256_file(MERGED / "model.safetensors") == before
    assert not list(MERGED.parent.glob(".merged*"))


def test_a_folder_that_merge_did_not_write_is_not_replaced(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MERGED.mkdir()
    (MERGED / "thesis.txt").write_text("years of work")
    assert merge() == 3
    assert "no step wrote it" in capsys.readouterr().err
    assert (MERGED / "thesis.txt").read_text() == "years of work"


def test_an_adapter_of_another_base_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    weights = Path(f"adapters/{RUN}/adapter_model.safetensors")
    save_file({name: value[:, :8].contiguous() for name, value in load_file(weights).items()}, weights)
    for flags in ((), ("--set", "merge.by_layer=true")):
        assert merge(*flags) == 3
        assert "fit this base" in (error := capsys.readouterr().err) or "does not load" in error
        assert not MERGED.exists()


def test_a_run_that_is_not_there_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge("--run", "nowhere") == 2
    assert "there is no run 'nowhere'" in (error := capsys.readouterr().err) and RUN in error
