"""The probe's verdicts, with stand-ins for Unsloth and xformers in the child's path; torch and transformers are real."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts.utils import backend_choice, files, unsloth_child, unsloth_probe
from scripts.utils.errors import MachineError
from scripts.utils.schema import Config
from scripts.utils.unsloth_probe import Verdict
from tests.commands import ROOT, environment

CONFIG = Config(tuning={"mode": "lora", "backend": "unsloth"}, train={"precision": "fp32"})  # type: ignore[arg-type]

# takes what it is asked for to plain transformers and peft
UNSLOTH = """
class FastLanguageModel:
    @staticmethod
    def from_pretrained(model_name, dtype, attn_implementation=None, **_):
        from transformers import AutoModelForCausalLM
        options = {"attn_implementation": attn_implementation} if attn_implementation else {}
        return AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype, **options), None

    @staticmethod
    def get_peft_model(model, r, lora_alpha, target_modules, **_):
        from peft import LoraConfig, get_peft_model
        return get_peft_model(model, LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules))
"""
# the message of xformers 0.0.35 where no kernel fits, raised as there: by the backward only
XFORMERS = """
import torch

class LowerTriangularMask:
    pass

class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(context, query, key, value):
        return query * 1

    @staticmethod
    def backward(context, gradient):
        BACKWARD

def memory_efficient_attention(query, key, value, attn_bias):
    return _Attention.apply(query, key, value)
"""
NO_OPERATOR = 'raise NotImplementedError("No operator found for `memory_efficient_attention_backward` with inputs:")'


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put packages before all others, for this process's look-ups and for the child; the cache lies apart too."""
    folder = tmp_path / "stand-ins"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(unsloth_probe, "cache_folder", lambda: tmp_path / "probes")

    def put(**modules: str) -> Path:
        for name, code in modules.items():
            path = folder / Path(*name.split("__"))
            path.mkdir(parents=True, exist_ok=True)
            (path / "__init__.py").write_text(code)
        return folder

    return put


def kept(tmp_path: Path) -> list[dict[str, Any]]:
    return [files.read_json(path) for path in sorted((tmp_path / "probes").glob("*.json"))]


def test_a_step_on_a_tiny_model_is_a_working_verdict_that_is_kept(
    stand_in: Callable[..., Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(unsloth=UNSLOTH)
    found = unsloth_probe.verdict(CONFIG, tiny_model)
    assert found.works, found.reason
    assert (found.attention, found.precision, found.xformers) == ("sdpa", "fp32", "not installed")
    assert "one step" in found.tried and "trying Unsloth on a tiny model" in capsys.readouterr().err
    assert len(kept(tmp_path)) == 1
    assert unsloth_probe.verdict(CONFIG, tiny_model) == found
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        ("raise NotImplementedError('Unsloth cannot find any torch accelerator? You need a GPU.')", "accelerator", "no accelerator"),
        ("import absent_package", "import", "absent_package (no version known)"),
        ("import broken_vision", "import", "broken_vision (no version known): RuntimeError: operator vision::nms does not exist"),
        ("import torch._no_such_part", "import", "torch"),
    ],
)  # fmt: skip
def test_a_failing_import_is_told_by_its_kind(
    stand_in: Callable[..., Path], tiny_model: Path, tmp_path: Path, code: str, kind: str, said: str
) -> None:
    stand_in(unsloth=code, broken_vision="raise RuntimeError('operator vision::nms does not exist')")
    found = unsloth_probe.verdict(CONFIG, tiny_model)
    assert (found.kind, found.works) == (kind, False) and said in str(found.reason), found.reason
    assert len(kept(tmp_path)) == 1 and backend_choice.remedy(found)


def test_an_unsupported_architecture_is_told(stand_in: Callable[..., Path], tiny_model: Path) -> None:
    refusal = "        raise NotImplementedError(f'Unsloth: {model_name} is not supported yet!')\n"
    stand_in(unsloth=UNSLOTH.replace("        from transformers", refusal + "        from transformers"))
    found = unsloth_probe.verdict(CONFIG, tiny_model)
    assert found.kind == "architecture" and "not supported yet" in str(found.reason)
    assert "right for this model" in backend_choice.remedy(found)


@pytest.mark.parametrize(
    ("code", "said"),
    [("os._exit(139)", "code 139"), ("os.kill(os.getpid(), 11)", "SIGSEGV"), ("os.abort()", "SIGABRT")],
)
def test_a_crash_of_the_child_is_told_and_not_kept(
    stand_in: Callable[..., Path], tiny_model: Path, tmp_path: Path, code: str, said: str
) -> None:
    stand_in(unsloth=f"import os\n{code}")
    found = unsloth_probe.verdict(CONFIG, tiny_model)
    assert found.kind == "crash" and said in str(found.reason) and "its import" in str(found.reason), found.reason
    assert kept(tmp_path) == []


@pytest.mark.slow
def test_a_hang_ends_at_the_limit_with_all_that_it_started_and_is_not_kept(
    stand_in: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    worker = tmp_path / "worker"
    stand_in(
        unsloth="import subprocess, time\n"
        f"open({str(worker)!r}, 'w').write(str(subprocess.Popen(['sleep', '600']).pid))\n"
        "time.sleep(600)"
    )
    start = time.monotonic()
    found = unsloth_probe.verdict(CONFIG, tiny_model, seconds=10)
    assert time.monotonic() - start < 40
    assert found.kind == "hang" and "10 seconds" in str(found.reason)
    assert kept(tmp_path) == []
    time.sleep(0.2)
    state = Path(f"/proc/{worker.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


@pytest.mark.slow
def test_xformers_that_fails_backward_is_off_before_unsloth_is_imported(
    stand_in: Callable[..., Path], tiny_model: Path
) -> None:
    seen = "import sys\nassert sys.modules['xformers'] is None\n"
    stand_in(unsloth=seen + UNSLOTH, xformers="", xformers__ops=XFORMERS.replace("BACKWARD", NO_OPERATOR))
    found = unsloth_probe.verdict(CONFIG, tiny_model)
    assert found.works, found.reason
    assert found.xformers.startswith("off: NotImplementedError: No operator found for `memory_efficient_attention_back")
    assert found.attention == "sdpa"


@pytest.mark.slow
def test_xformers_that_works_stays_on(stand_in: Callable[..., Path], tiny_model: Path) -> None:
    stand_in(
        unsloth="import xformers.ops\n" + UNSLOTH,
        xformers="",
        xformers__ops=XFORMERS.replace("BACKWARD", "return gradient, gradient, gradient"),
    )
    found = unsloth_probe.verdict(CONFIG, tiny_model)
    assert found.works and found.xformers == "on", found


@pytest.mark.slow
def test_xformers_that_kills_the_process_is_off_and_unsloth_is_still_tried(
    stand_in: Callable[..., Path], tiny_model: Path
) -> None:
    stand_in(unsloth=UNSLOTH, xformers="", xformers__ops="import os\nos.abort()")
    found = unsloth_probe.verdict(CONFIG, tiny_model)
    assert found.works and found.xformers.startswith("off: ") and "SIGABRT" in found.xformers, found


@pytest.mark.slow
def test_xformers_that_fails_only_in_the_models_step_is_off_in_a_second_trial(
    stand_in: Callable[..., Path], tiny_model: Path
) -> None:
    fails = f"import sys\nif sys.modules['xformers'] is not None:\n    {NO_OPERATOR}\n"
    works = XFORMERS.replace("BACKWARD", "return gradient, gradient, gradient")
    stand_in(unsloth=fails + UNSLOTH, xformers="", xformers__ops=works)
    found = unsloth_probe.verdict(CONFIG, tiny_model)
    assert found.works and found.xformers.startswith("off: ") and "No operator found" in found.xformers, found


@pytest.mark.slow
def test_a_model_that_is_loaded_with_another_attention_than_sdpa_does_not_pass(
    stand_in: Callable[..., Path], tiny_model: Path
) -> None:
    deaf = UNSLOTH.replace("from transformers", "attn_implementation = 'eager'\n        from transformers", 1)
    stand_in(unsloth=deaf, xformers="", xformers__ops=XFORMERS.replace("BACKWARD", NO_OPERATOR))
    found = unsloth_probe.verdict(CONFIG, tiny_model)
    assert not found.works and "attention eager, not sdpa" in str(found.reason), found


@pytest.fixture
def answers(stand_in: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> list[Verdict]:
    """What the child answers, one after another, without the seconds that it takes."""
    stand_in(unsloth="")
    left: list[Verdict] = []
    monkeypatch.setattr(unsloth_probe, "_ask", lambda question, seconds: (left.pop(0), "import"))
    return left


def test_a_failing_verdict_is_trusted_for_an_hour_and_a_working_one_for_good(
    answers: list[Verdict], tiny_model: Path, tmp_path: Path
) -> None:
    answers += [Verdict("it fails", "step"), Verdict(), Verdict("it fails again", "step")]
    assert not unsloth_probe.verdict(CONFIG, tiny_model).works
    assert not unsloth_probe.verdict(CONFIG, tiny_model).works and len(answers) == 2
    (path,) = (tmp_path / "probes").iterdir()

    def age(seconds: float) -> None:
        files.write_json(path, {**files.read_json(path), "at": time.time() - seconds})

    age(3700)
    assert unsloth_probe.verdict(CONFIG, tiny_model).works
    age(10 * 365 * 86400)
    assert unsloth_probe.verdict(CONFIG, tiny_model).works and len(answers) == 1
    assert not unsloth_probe.verdict(CONFIG, tiny_model, fresh=True).works


@pytest.mark.parametrize("damage", ["", "[]", '{"at": 1}x', '{"at": 1e12, "reason": null, "new_field": 1}'])
def test_a_damaged_cache_is_asked_again(answers: list[Verdict], tiny_model: Path, tmp_path: Path, damage: str) -> None:
    answers += [Verdict(), Verdict()]
    unsloth_probe.verdict(CONFIG, tiny_model)
    (path,) = (tmp_path / "probes").iterdir()
    path.write_text(damage)
    assert unsloth_probe.verdict(CONFIG, tiny_model).works and answers == []


def test_whatever_can_change_the_verdict_changes_the_key(
    stand_in: Callable[..., Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stand_in(unsloth="")
    keys = [unsloth_probe.key(CONFIG, tiny_model)]
    assert unsloth_probe.key(CONFIG, tiny_model) == keys[0]
    for change in ({"tuning": {"mode": "full"}}, {"train": {"precision": "bf16"}}, {"model": {"attention": "eager"}}):
        keys.append(unsloth_probe.key(Config(**{**CONFIG.model_dump(), **change}), tiny_model))
    monkeypatch.setenv("UNSLOTH_DISABLE_CPU_FALLBACK", "1")
    keys.append(unsloth_probe.key(CONFIG, tiny_model))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    keys.append(unsloth_probe.key(CONFIG, tiny_model))
    for package in ("unsloth", "torchvision", "xformers"):
        information = folder / f"{package}-99.1.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 99.1\n")
        keys.append(unsloth_probe.key(CONFIG, tiny_model))
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    keys.append(unsloth_probe.key(CONFIG, other))
    # a card or a driver as nvidia-smi tells it
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 4060, 580.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    keys.append(unsloth_probe.key(CONFIG, tiny_model))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"num_key_value_heads": 8}),
        ("qwen2", {"num_attention_heads": 12, "num_key_value_heads": 2, "hidden_size": 1536, "max_window_layers": 28}),
        ("mistral", {}),
        ("gemma3_text", {"num_hidden_layers": 12}),
        ("qwen3_moe", {"moe_intermediate_size": 768}),
        ("smollm3", {}),
    ],
)
def test_a_tiny_model_keeps_what_decides_the_kernels(tmp_path: Path, model_type: str, settings: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model, tiny = tmp_path / "model", tmp_path / "tiny"
    tiny.mkdir()
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    AutoConfig.for_model(model_type, vocab_size=512, **special, **settings).save_pretrained(model)
    assert unsloth_child.make_tiny(model, tiny) is None
    loaded = AutoModelForCausalLM.from_pretrained(tiny)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (model, tiny))
    assert new["model_type"] == old["model_type"]
    assert unsloth_child.head_width(new) == unsloth_child.head_width(old)
    assert set(new.get("layer_types") or []) == set(old.get("layer_types") or [])
    share = [c["num_attention_heads"] // c["num_key_value_heads"] for c in (old, new)]
    assert share[1] == min(share[0], 4)
    assert sum(weight.numel() for weight in loaded.parameters()) < 40e6


def test_an_architecture_with_other_names_for_its_sizes_is_said_to_be_untried(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path / "model")
    (tmp_path / "tiny").mkdir()
    assert "num_hidden_layers" in str(unsloth_child.make_tiny(tmp_path / "model", tmp_path / "tiny"))


def test_a_fallback_names_reason_and_remedy_and_never_refuses(
    answers: list[Verdict], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers.append(Verdict("it finds no accelerator here", "accelerator", "off: no kernel"))
    choice = backend_choice.choose(CONFIG, tiny_model)
    assert (choice.requested, choice.actual, choice.xformers) == ("unsloth", "bitsandbytes", "off: no kernel")
    assert "tuning.backend: bitsandbytes" in choice.remedy
    never = Config(**{**CONFIG.model_dump(), "tuning": {"backend": "unsloth", "fallback": "never"}})
    answers.append(Verdict("it fails", "step"))
    with pytest.raises(MachineError) as caught:
        backend_choice.choose(never, tiny_model)
    assert caught.value.exit_code == 4 and "it fails" in caught.value.message and "fallback" in caught.value.hint


def test_a_restart_takes_bitsandbytes_without_another_trial(
    answers: list[Verdict], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(backend_choice.REASON_VARIABLE, "it failed before its first step ended: planted")
    monkeypatch.setenv(backend_choice.XFORMERS_VARIABLE, "on")
    choice = backend_choice.choose(CONFIG, tiny_model)  # the child has no answer ready: it is not asked
    assert (choice.actual, choice.xformers) == ("bitsandbytes", "on") and "planted" in str(choice.reason)
    assert backend_choice.REASON_VARIABLE not in os.environ


def test_a_run_that_fell_back_goes_on_with_bitsandbytes(answers: list[Verdict], tiny_model: Path) -> None:
    earlier = {"requested": "unsloth", "actual": "bitsandbytes", "fallback_reason": "it failed"}
    assert backend_choice.choose(CONFIG, tiny_model, earlier).actual == "bitsandbytes"
    answers.append(replace(Verdict(), xformers="on"))
    assert backend_choice.choose(CONFIG, tiny_model, {**earlier, "fallback_reason": None}).actual == "unsloth"


def test_choosing_imports_nothing_heavy(tiny_model: Path) -> None:
    code = (
        "import sys; sys.modules['unsloth'] = None\n"
        "from pathlib import Path\n"
        "from scripts.utils import backend_choice\n"
        "from scripts.utils.schema import Config\n"
        f"choice = backend_choice.choose(Config(tuning={{'backend': 'unsloth'}}), Path({str(tiny_model)!r}))\n"
        "assert (choice.actual, choice.reason) == ('bitsandbytes', 'it is not installed'), choice\n"
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
