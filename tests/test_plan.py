"""plan: the parts of the prediction, what is chosen by it, what it says where a run does not fit, and the levers it has."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts import plan
from scripts.utils import architecture, forecast, memory, planning, stamp
from scripts.utils.config import load_config
from scripts.utils.errors import UserError
from scripts.utils.files import REPO_ROOT
from scripts.utils.hardware import Hardware
from scripts.utils.schema import Config
from tests.tiny_models import FAMILIES, tiny

# numbers of the models' config.json: family, hidden, intermediate, layers, heads, kv heads, vocabulary, tied
MODELS = {
    "Qwen2.5-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-3B": ("qwen2", 2048, 11008, 36, 16, 2, 151936, True),
    "Qwen2.5-7B": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "Llama-3.1-8B": ("llama", 4096, 14336, 32, 32, 8, 128256, False),
}
_KEYS = (
    "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size "
    "tie_word_embeddings"
).split()


def config_of(name: str) -> dict[str, Any]:
    return dict(zip(_KEYS, MODELS[name], strict=True))


def card(gib: float) -> Hardware:
    return Hardware("cuda", f"a card of {gib} GiB", round(gib * 2**30), (8, 6))


def planned(name: str = "Qwen2.5-1.5B", gib: float = 8, **sections: dict[str, Any]) -> planning.Plan:
    config = Config.model_validate(sections)
    return planning.make(config, architecture.from_config(config_of(name)), card(gib), "bf16", "bitsandbytes")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_adapter_are_counted_as_the_real_model_has_them(family: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny(family)
    shape = architecture.from_config(json.loads(model.config.to_json_string()))
    assert shape.total == sum(p.numel() for p in model.parameters())
    model = get_peft_model(model, LoraConfig(r=4, target_modules=[linear.name for linear in shape.linears]))
    assert shape.adapter(4, None) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("mode", "precision"), [("lora", "fp32"), ("lora", "bf16"), ("full", "fp32")])
def test_what_a_layer_saves_for_backward_is_what_autograd_keeps(mode: str, precision: str) -> None:
    """A layer more of the real model keeps as many bytes more as the formula says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from scripts.utils.attention import by_segment
    from scripts.utils.encoding import Encoded
    from scripts.utils.lean_lora import lean
    from scripts.utils.loss import summed_loss
    from scripts.utils.packing import to_row

    tokens, found = 640, []  # longer than what short attention takes, which keeps less
    for layers in (1, 2):
        shape = LlamaConfig(
            vocab_size=200,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = LlamaForCausalLM(shape).to(torch.bfloat16 if precision == "bf16" else torch.float32)
        if mode == "lora":
            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            model = get_peft_model(model, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor, known: Any = weights, kept: Any = storages) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage
            return tensor

        row = to_row([Encoded([7] * tokens, [True] * tokens)])
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
        with by_segment(model), lean(model, mode == "lora"), hooks, mixed:
            loss = summed_loss(model, row)
        found.append(sum(storage.nbytes() for storage in storages.values()))
        del loss
    known = architecture.from_config(json.loads(shape.to_json_string()))
    wide = 2 if precision == "bf16" else 4
    run = setting(device="cpu", mode=mode, precision=precision, tokens=tokens, longest=tokens, rank=8)
    said = memory.saved_by_layer(known, run, wide)
    said += (known.adapter(8, None) // 2) * 2 if precision == "bf16" else 0  # autocast's copies of this layer's adapter
    assert found[1] - found[0] == pytest.approx(said, rel=0.02)


def setting(**changes: Any) -> memory.Setting:
    plain = memory.Setting(
        device="cuda",
        mode="qlora",
        precision="bf16",
        tokens=2048,
        longest=2048,
        rank=16,
        targets=None,
        dropout=False,
        optimizer="paged_adamw_8bit",
        checkpointing=True,
    )
    return replace(plain, **changes)


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_add_up_to_the_peak(name: str) -> None:
    found = memory.predict(architecture.from_config(config_of(name)), setting())
    assert found.peak == sum(found.always.values()) + max(found.turns.values())
    assert all(size >= 0 for size in (*found.always.values(), *found.turns.values()))
    facts = planned(name).facts()
    assert sum(facts["parts"].values()) == facts["predicted_peak"]


def test_four_bit_weights_take_what_double_quantisation_says() -> None:
    """0.127 bits a weight for the tables, as the QLoRA paper has it (arXiv 2305.14314, section 3)."""
    assert memory.quantisation_tables(64 * 256 * 100) * 8 / (64 * 256 * 100) == pytest.approx(0.127, abs=0.001)
    shape = architecture.from_config(config_of("Llama-3.1-8B"))
    found = memory.predict(shape, setting()).always["weights"]
    assert found == shape.in_linears // 2 + 2 * (shape.total - shape.in_linears)


@pytest.mark.parametrize(
    "larger",
    [
        {"tokens": 4096, "longest": 4096},
        {"rank": 64},
        {"precision": "fp32"},
        {"mode": "lora"},
        {"checkpointing": False},
        {"optimizer": "adamw_torch"},
        {"dropout": True, "checkpointing": False},
        {"chunked": False},
        {"scores_kept": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", MODELS)
def test_more_of_anything_takes_more(name: str, larger: dict[str, Any]) -> None:
    shape = architecture.from_config(config_of(name))
    assert memory.predict(shape, setting(**larger)).peak > memory.predict(shape, setting()).peak


def test_each_lever_takes_less() -> None:
    shape = architecture.from_config(config_of("Llama-3.1-8B"))
    plain = memory.predict(shape, setting())
    assert plain.peak - memory.predict(shape, setting(host_embeddings=True)).peak == 2 * shape.embedding
    for lever in ({"offload": True}, {"targets": ["q_proj", "v_proj"]}):
        assert memory.predict(shape, setting(**lever)).peak < plain.peak
    tied = architecture.from_config(config_of("Qwen2.5-3B"))
    assert memory.predict(tied, setting(host_embeddings=True)) == memory.predict(tied, setting())


@pytest.mark.parametrize("name", MODELS)
def test_qlora_with_2048_tokens_fits_8_gib_by_plan(name: str) -> None:
    found = planned(name)
    assert found.fits and found.run.tokens == 2048 and found.config.lora.r == 16
    assert found.run.host_embeddings == (name in ("Qwen2.5-7B", "Llama-3.1-8B"))
    text = (REPO_ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert f"| {name} | {found.memory.peak / 2**30:.1f} GiB |" in text, "docs/memory.md shows another number"


def test_checkpointing_is_chosen_where_memory_needs_it() -> None:
    assert [planned("Qwen2.5-3B", gib).run.checkpointing for gib in (8, 80)] == [True, False]
    assert planned("Qwen2.5-3B", 80, train={"gradient_checkpointing": True}).run.checkpointing


def test_batch_size_auto_picks_more_on_a_larger_card_and_keeps_the_step() -> None:
    auto = {"batch_size": "auto", "gradient_accumulation": 8}
    small, large = (planned("Llama-3.1-8B", gib, train=auto).config.train for gib in (8, 80))
    assert 1 <= small.micro_batch < large.micro_batch
    for train in (small, large):
        assert train.micro_batch * train.gradient_accumulation == 8
    assert planned("Qwen2.5-1.5B", 80, train={**auto, "pack_length": 512}).config.train.micro_batch == 1
    tokens = [planned("Llama-3.1-8B", gib, train=auto).run.tokens for gib in (8, 80)]
    assert tokens == [2048 * small.micro_batch, 2048 * large.micro_batch]


def test_a_resolved_config_is_resolved_to_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("Llama-3.1-8B")))
    config = Config.model_validate({"train": {"batch_size": "auto"}})
    once, found, _ = planning.resolve(config, tmp_path, card(8), "bf16", "bitsandbytes")
    assert found and (once.model.embeddings, once.train.gradient_checkpointing) == ("host", True)
    assert planning.resolve(once, tmp_path, card(8), "bf16", "bitsandbytes")[0] == once


def test_what_does_not_fit_comes_with_the_settings_to_change() -> None:
    wasteful = {
        "train": {
            "batch_size": 4,
            "gradient_accumulation": 2,
            "gradient_checkpointing": False,
            "optimizer": "adamw_torch",
        },
        "tuning": {"mode": "lora"},
        "model": {"embeddings": "device"},
    }
    found = planned("Llama-3.1-8B", 8, **wasteful)
    assert not found.fits
    changes = planning.remedies(found)
    assert changes[0][0] == "train.batch_size=1 train.gradient_accumulation=8" and changes[-1][2].fits
    peaks = [found.memory.peak, *(new.memory.peak for _, _, new in changes)]
    assert peaks == sorted(peaks, reverse=True)
    words = " ".join(word for word, _, _ in changes)
    assert "tuning.mode=qlora" in words and "model.embeddings=host" in words
    assert not planning.remedies(planned())


def folder_of(where: Path, config: dict[str, Any]) -> Path:
    where.mkdir()
    (where / "config.json").write_text(json.dumps(config))
    return where


def test_plan_needs_config_json_alone_and_exits_4_where_it_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.utils import environment

    monkeypatch.setattr(environment, "_HEAVY", ())
    monkeypatch.chdir(tmp_path)
    model = str(folder_of(tmp_path / "m", config_of("Llama-3.1-8B")))
    words = ["--config", str(REPO_ROOT / "configs/run_bnb.yaml"), "--model", model]
    assert plan.main([*words, "--gpu-gb", "8"]) == 0
    shown = capsys.readouterr().out
    assert "fits: predicted peak" in shown and "left" in shown and "unknown: no rendered rows" in shown
    monkeypatch.setenv("SFT_GPU_GB", "6.5")
    assert plan.main(words) == 4
    shown = capsys.readouterr()
    assert "does not fit" in shown.out and "train.activation_offload=true" in shown.out
    assert shown.err.endswith("exit code 4\n")
    monkeypatch.setenv("SFT_GPU_GB", "2")
    assert plan.main(words) == 4
    assert "take a smaller model" in capsys.readouterr().out
    monkeypatch.setenv("SFT_GPU_GB", "many")
    assert plan.main(words) == 2


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "mamba"}, "'mamba' is built in a way unknown here"),
        ({"num_local_experts": 8}, "has experts"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
    ],
)
def test_a_model_that_cannot_be_planned_is_said_plainly_and_trains_all_the_same(
    tmp_path: Path, changes: dict[str, Any], word: str
) -> None:
    folder = folder_of(tmp_path / "m", {**config_of("Qwen2.5-3B"), **changes})
    with pytest.raises(UserError, match=word):
        architecture.read(folder)
    config = Config.model_validate({"train": {"batch_size": "auto"}})
    resolved, found, why = planning.resolve(config, folder, card(8), "bf16", "bitsandbytes")
    assert found is None and word in why
    assert (resolved.train.batch_size, resolved.train.gradient_checkpointing) == (1, True)


def test_rows_steps_and_hours_come_from_the_rendered_rows(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts import process, render

    project(epochs=2)
    config = load_config("tiny.yaml")
    for module in (process, render):
        module.work(module.build_parser().parse_args(["--config", "tiny.yaml"]), config)
    capsys.readouterr()
    assert plan.work(plan.build_parser().parse_args(["--config", "tiny.yaml"]), config) == 0
    shown = capsys.readouterr().out
    rows, tokens = forecast.rows_in_data(config) or (0, 0.0)
    assert rows and f"{rows:,} train rows, about {tokens:,.0f} tokens an epoch" in shown
    assert "assumed, not measured" in shown


def test_train_shows_the_plan_and_stamps_the_chosen_batch(
    project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.utils.errors import RefusedError
    from tests.test_train import RUN, run_steps

    project(max_steps=1, gradient_accumulation=4, batch_size="auto")
    run_steps()
    said = capsys.readouterr().err
    assert "plan: fits: predicted peak" in said and "plan: 512 tokens a micro batch, 1 a step" in said
    known = stamp.require(RUN)
    assert known["plan"]["batch_size"] == known["identity"]["batch_size"] == 4
    assert known["plan"]["gradient_accumulation"] == known["identity"]["gradient_accumulation"] == 1
    run_steps(overrides="train.batch_size=4 train.gradient_accumulation=1")  # the same, so nothing is refused
    with pytest.raises(RefusedError, match="batch_size"):
        run_steps(overrides="train.batch_size=2")
    monkeypatch.setitem(planning.USABLE, "cpu", 1e-3)
    run_steps(overrides="run.name=tight")
    said = capsys.readouterr().err
    assert "plan: does not fit" in said and "tried all the same" in said
    assert stamp.require("tight")["plan"]["fits"] is False
    assert stamp.require("tight")["gradient_checkpointing"] is True


def gradients(model: Any, context: Any) -> tuple[float, list[Any]]:
    from scripts.utils.encoding import Encoded
    from scripts.utils.loss import summed_loss
    from scripts.utils.packing import to_row

    model.zero_grad()
    ids = [5 + n % 250 for n in range(200)]
    with context:
        loss = summed_loss(model, to_row([Encoded(ids, [True] * len(ids))]))
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_in_host_memory_change_no_number(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    import torch

    from scripts.utils import offload

    monkeypatch.setattr(offload, "_LEAST", 64)
    model = tiny("llama").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, plain = gradients(model, nullcontext())
    copied = []
    pack = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *a, **k: copied.append(1) or pack(*a, **k))
    again, moved = gradients(model, offload.activations_on_host(model))
    assert loss == again and len(plain) == len(moved) and all(map(torch.equal, plain, moved))
    assert copied, "nothing was moved"


def test_embeddings_in_host_memory_change_no_number_and_stay_there() -> None:
    from contextlib import nullcontext

    import torch
    from peft import LoraConfig, get_peft_model

    from scripts.utils.offload import keep_embeddings_on_host

    results = []
    for host in (False, True):
        model = tiny("qwen2")
        assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
        if host:
            keep_embeddings_on_host(model)
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        results.append(gradients(model.train(), nullcontext()))
    assert results[0][0] == results[1][0] and all(map(torch.equal, results[0][1], results[1][1]))
    moved = model.to("meta")  # stands for a card
    assert moved.get_input_embeddings().weight.device.type == "cpu"
    assert moved.get_output_embeddings().weight.device.type == "meta"
    rows = moved.get_input_embeddings()(torch.zeros(1, 3, dtype=torch.long))
    assert rows.shape == (1, 3, 32) and rows.device.type == "cpu"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_prediction_is_near_what_real_steps_take() -> None:
    from benchmarks.plan_memory import measure_all

    shape = (256, 688, 6, 4, 4, 16000, True)
    for combination, predicted, used in measure_all(
        [(shape, "lora", 1024, False, "fp32"), (shape, "full", 512, True, "fp32")]
    ):
        assert 0.7 < predicted / used < 1.3, combination


def test_a_model_computes_where_its_layers_lie_not_where_its_embeddings_do() -> None:
    """Seen on a card: with embeddings on the host, rows went to the CPU and met weights that were elsewhere."""
    import torch

    from scripts.utils.offload import computing_device
    from tests.tiny_models import tiny

    with torch.device("meta"):
        model = tiny("llama")
    model.model.embed_tokens = torch.nn.Embedding(300, 32, device="cpu")
    assert next(model.parameters()).device.type == "cpu" and computing_device(model).type == "meta"
