"""What only a CUDA card shows: the variable-length kernel, fused kernels, 8-bit states, host memory, too little memory."""

import copy
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_memory import CAPPED
from scripts.utils import fused_kernels
from scripts.utils.attention import CannotSegment, by_segment, has_kernel
from scripts.utils.lean_lora import lean
from scripts.utils.loss import find_exact, on_device, plain_loss, summed_loss, tolerance, whole_loss
from scripts.utils.packing import to_row
from tests.commands import ROOT, run
from tests.test_lean_lora import adapted
from tests.test_loss import VOCAB, examples, gradients
from tests.tiny_models import FAMILIES, smollm2_tokenizer, tiny, tiny_llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
WITHOUT_CAPPED_SCORES = [name for name in FAMILIES if name != "gemma2"]


def off_by(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("prefix", [0, 40])
@pytest.mark.parametrize("name", WITHOUT_CAPPED_SCORES)
def test_the_kernel_is_as_exact_as_segments_one_by_one(name: str, prefix: int) -> None:
    """In bf16, both beside fp32: windows, groups of heads and shared beginnings."""
    exact = tiny(name, vocab=VOCAB).cuda()
    low = copy.deepcopy(exact).to(torch.bfloat16)
    rows = examples(prefix=prefix)
    row = on_device(to_row(rows, shared=True), "cuda")
    wanted = gradients(exact, sum(whole_loss(exact, on_device(to_row([one]), "cuda")) for one in rows))

    def found(kernel: bool) -> torch.Tensor:
        with by_segment(low, True, kernel):
            return gradients(low, summed_loss(low, row))

    assert has_kernel(low) and not has_kernel(exact), "it takes 16 bit"
    assert off_by(found(True), wanted) <= 1.25 * off_by(found(False), wanted) + 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_run_compares_is_exact_on_a_card(name: str) -> None:
    low = find_exact(adapted(tiny(name, vocab=VOCAB)).cuda().to(torch.bfloat16), examples())
    assert low.packing and low.segments and low.shared and low.chunked and low.lean
    assert low.kernel == (name != "gemma2"), "capped scores are not for it"
    plain = find_exact(tiny(name, vocab=VOCAB).cuda(), examples())
    assert plain.packing and plain.segments and plain.shared and plain.chunked and not plain.kernel


def test_capped_scores_are_refused_by_the_kernel() -> None:
    model = tiny("gemma2", vocab=VOCAB).cuda().to(torch.bfloat16)
    with pytest.raises(CannotSegment), by_segment(model, True, kernel=True):
        summed_loss(model, on_device(to_row(examples()), "cuda"))


@pytest.mark.skipif(fused_kernels.version() is None, reason="needs liger-kernel")
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "smollm3"])
def test_fused_kernels_leave_loss_and_gradients_as_they_were(name: str) -> None:
    model = adapted(tiny(name, vocab=VOCAB)).cuda()
    row = on_device(to_row(examples()), "cuda")
    with by_segment(model), lean(model):
        wanted = gradients(model, summed_loss(model, row))
    by = fused_kernels.put(model, True, "cuda", lambda: plain_loss(model, examples()), tolerance(model))
    assert by == f"liger-kernel {importlib.metadata.version('liger-kernel')}"
    with by_segment(model), lean(model):
        found = gradients(model, summed_loss(model, row))
    assert off_by(found, wanted) < 1e-3


# --- whole runs


def steps(*words: str, train: str = "train") -> None:
    for name in ("process", "render", train):
        more = words if name == train else ()
        done = run([sys.executable, ROOT / "scripts" / f"{name}.py", "--config", "tiny.yaml", *more], Path.cwd())
        assert done.returncode == 0, done.stderr


def facts(name: str = "tiny-sums") -> dict[str, Any]:
    return json.loads((Path("outputs") / name / "backend.json").read_text())


def losses(name: str = "tiny-sums") -> list[float]:
    lines = (Path("outputs") / name / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.slow
def test_embeddings_on_the_host_train_as_those_on_the_card(project: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_llama(seed=3)
    base.config.tie_word_embeddings = False
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    base.save_pretrained(tmp_path / "untied")
    smollm2_tokenizer().save_pretrained(tmp_path / "untied")
    project(rows=40, precision="bf16")
    for where in ("device", "host"):
        words = f"model.name={tmp_path / 'untied'} tuning.mode=qlora run.name={where} model.embeddings={where}"
        for name in ("process", "render", "train"):
            done = run(
                [sys.executable, ROOT / "scripts" / f"{name}.py", "--config", "tiny.yaml", "--set", words], Path.cwd()
            )
            assert done.returncode == 0, done.stderr
    assert facts("host")["plan"]["embeddings"] == "host" and facts("host")["engine"]["kernel"]
    assert losses("host") == pytest.approx(losses("device"), rel=0.02)


LEVERS = "train.optimizer=paged_adamw_8bit train.activation_offload=true train.gradient_checkpointing=true"


@pytest.mark.slow
def test_a_run_on_a_card_takes_the_levers_it_was_given_and_says_so(project: Callable[..., Path]) -> None:
    project(rows=40, precision="bf16")
    steps("--set", "tuning.mode=qlora run.name=plain")
    steps("--set", f"tuning.mode=qlora run.name=levers {LEVERS}")
    plain, levers = facts("plain"), facts("levers")
    assert plain["hardware"]["device"] == levers["hardware"]["device"] == "cuda"
    assert plain["engine"]["kernel"] and plain["engine"]["lean"] and plain["quantisation"] == "nf4, double"
    assert levers["plan"]["activation_offload"] and levers["gradient_checkpointing"]
    assert losses("levers") == pytest.approx(losses("plain"), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_every_precision_trains_and_resumes(precision: str, project: Callable[..., Path]) -> None:
    project(rows=40, precision=precision, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
    steps("--set", "train.max_steps=4 train.scheduler=constant")
    steps("--set", "train.max_steps=8 train.scheduler=constant")
    assert [start["from_step"] for start in facts()["starts"]] == [0, 4]
    assert facts()["precision"]["actual"] == precision and len(losses()) == 8


@pytest.mark.slow
def test_a_card_that_is_too_small_cuts_micro_batches_and_learns_the_same(project: Callable[..., Path]) -> None:
    project(rows=200, precision="fp32", pack_length=2048, gradient_accumulation=1)
    steps("--set", "run.name=roomy")
    row = [
        line for line in map(json.loads, Path("outputs/roomy/metrics.jsonl").read_text().splitlines()) if "loss" in line
    ]
    needed = max(line["memory_gib"] for line in row) * 1024
    words = ["--config", "tiny.yaml", "--set", "run.name=small"]
    done = run(
        [sys.executable, "-c", CAPPED, str(needed * 0.75 * 2**20), *words],
        Path.cwd(),
        PYTHONPATH=f"{ROOT}:{':'.join(sys.path)}",
    )
    assert done.returncode == 0, done.stderr
    assert "every micro batch is cut into" in done.stderr
    assert losses("small") == pytest.approx(losses("roomy"), rel=1e-3)


def test_the_doctor_runs_attention_and_four_bits_on_the_card(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"include: {ROOT / 'configs' / 'base.yaml'}\n")
    done = run([sys.executable, ROOT / "scripts" / "check.py", "--json", "--config", "run.yaml"], tmp_path)
    found = {
        f["topic"]: f
        for f in json.loads(done.stdout)["findings"]
        if f["topic"] in ("torch", "device", "attention", "bitsandbytes")
    }
    assert {topic: f["state"] for topic, f in found.items()} == dict.fromkeys(found, "ok")
    assert found["device"]["text"].startswith("cuda: ") and "kernels: " in found["attention"]["text"]
    assert "on cuda" in found["bitsandbytes"]["text"]
