"""Merging tensor by tensor: the in-memory result to the bit, for each family, 4-bit too, sharded too; else refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from scripts import merge as merge_step
from scripts.utils import files, merge_layers, merging, safetensors_writer, stamp
from scripts.utils.errors import RefusedError, UserError
from tests.tiny_models import FAMILIES, RUN, enter_run, smollm2_tokenizer, tiny

MERGED = Path(f"outputs/{RUN}/merged")


def merge(*flags: str) -> int:
    return merge_step.main(["--config", "c.yaml", *flags])


def source(
    folder: Path, model: Any, *, quantised: bool = False, dtype: str = "bf16", shards: str = "4GB", **lora: Any
) -> merging.Source:
    """A base of any family with a random adapter on it, as ``prepare`` would find them."""
    import torch
    from peft import LoraConfig, get_peft_model

    model.to(torch.bfloat16).save_pretrained(folder / "base", max_shard_size=shards)
    names = merge_targets(model)
    tuned = get_peft_model(
        model, LoraConfig(target_modules=names, task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **lora})
    )
    torch.manual_seed(1)
    for name, weight in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    tuned.save_pretrained(folder / "adapter")
    tokenizer = smollm2_tokenizer()
    from scripts.utils.chat import choose_template

    return merging.Source(
        run="x",
        base=folder / "base",
        adapter=folder / "adapter",
        tokenizer=tokenizer,
        template=choose_template(tokenizer, "auto"),
        quantised=quantised,
        dtype=dtype,  # type: ignore[arg-type]
        dtype_why="",
        compute="fp32",
        device="cpu",
        parameters=1,
        by_layer=True,
        by_layer_why="",
        proof="fp32",
    )


def merge_targets(model: Any) -> list[str]:
    from scripts.utils.backends import linear_names

    return linear_names(model)


def both_ways(where: merging.Source, folder: Path, shard_size: str = "4GB") -> tuple[Path, Path]:
    ours, theirs = folder / "by-layer", folder / "in-memory"
    ours.mkdir()
    merge_layers.write(where, merge_layers.plan(where), ours, shard_size)
    merging.save(merging.merged(where, merging.load_adapter_model(where)), where, theirs, shard_size)
    return ours, theirs


def assert_same(ours: Path, theirs: Path) -> None:
    import torch
    from safetensors.torch import load_file

    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
    for path in theirs.iterdir():
        if path.suffix == ".safetensors":
            mine, its = load_file(ours / path.name), load_file(path)
            assert mine.keys() == its.keys()
            assert all(torch.equal(mine[name], its[name]) for name in its)
        elif path.suffix == ".json":
            assert files.read_json(ours / path.name) == files.read_json(path), path.name
        else:
            assert (ours / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_by_layer_is_the_in_memory_merge_to_the_bit(family: str, tmp_path: Path) -> None:
    assert_same(*both_ways(source(tmp_path, tiny(family)), tmp_path))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_qlora_merge_by_layer_goes_through_the_same_four_bits(family: str, tmp_path: Path) -> None:
    assert_same(*both_ways(source(tmp_path, tiny(family), quantised=True), tmp_path))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("shards", ["20KB", "4GB"])
def test_sharded_bases_shards_of_any_size_and_each_precision(dtype: str, shards: str, tmp_path: Path) -> None:
    where = source(tmp_path, tiny("qwen2"), dtype=dtype, shards=shards, use_rslora=True)
    assert (len(list(where.base.glob("model-*.safetensors"))) > 1) == (shards == "20KB")
    ours, theirs = both_ways(where, tmp_path, "30KB")
    assert len(list(ours.glob("model-*.safetensors"))) > 2
    assert_same(ours, theirs)


def test_tied_and_untied_heads_both(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for tied in (True, False):
        model = tiny("llama")
        model.config.tie_word_embeddings = tied
        model = type(model)(model.config)
        folder = tmp_path / str(tied)
        ours, theirs = both_ways(source(folder, model), folder)
        assert_same(ours, theirs)
        again = AutoModelForCausalLM.from_pretrained(ours)
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_a_base_whose_file_holds_the_tied_head_twice_is_written_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny("llama")
    model.config.tie_word_embeddings = True
    where = source(tmp_path, type(model)(model.config))
    path = where.base / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    assert_same(*both_ways(where, tmp_path))


def test_what_was_written_is_read_back_and_a_flipped_bit_is_found(tmp_path: Path) -> None:
    where = source(tmp_path, tiny("llama"))
    plan, folder = merge_layers.plan(where), tmp_path / "out"
    folder.mkdir()
    merge_layers.write(where, plan, folder, "4GB")
    proof = merge_layers.verify(where, plan, folder)
    assert proof["tensors"] == len(plan.shapes) and proof["changed"] == len(plan.pairs) == 14
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 64
    path.write_bytes(data)
    with pytest.raises(RefusedError, match="is not what was merged"):
        merge_layers.verify(where, plan, folder)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"use_dora": True}, UserError, "no plain LoRA"),
        ({"rank_pattern": {"q_proj": 2}}, UserError, "no plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, UserError, "no plain LoRA"),
        ({"peft_type": "IA3"}, UserError, "no plain LoRA"),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_left_to_the_in_memory_way(
    change: dict[str, Any], error: type[Exception], text: str, tmp_path: Path
) -> None:
    where = source(tmp_path, tiny("llama"))
    path = where.adapter / "adapter_config.json"
    files.write_json(path, {**files.read_json(path), **change})
    with pytest.raises(error, match=text) as caught:
        merge_layers.plan(where)
    assert "merge.by_layer=false" in caught.value.hint  # type: ignore[attr-defined]


def test_an_adapter_of_another_base_or_with_numbers_that_are_none_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    where = source(tmp_path, tiny("llama"))
    path = where.adapter / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name.replace("layers.0", "layers.7"): value for name, value in weights.items()}, path)
    with pytest.raises(RefusedError, match="do not fit this base"):
        merge_layers.plan(where)
    save_file({name: value * float("nan") for name, value in weights.items()}, path)
    with pytest.raises(RefusedError, match="not finite"):
        merge_layers.write(where, merge_layers.plan(where), tmp_path, "4GB")
    path.write_bytes(b"")
    with pytest.raises(RefusedError, match="does not load"):
        merge_layers.plan(where)


def test_the_writer_refuses_another_tensor_than_was_announced(tmp_path: Path) -> None:
    import torch

    with pytest.raises(ValueError, match="announced"):
        safetensors_writer.write(tmp_path / "x", {"a": [2]}, "F32", [torch.zeros(3)])
    with pytest.raises(ValueError, match="shorter"):
        safetensors_writer.write(tmp_path / "x", {"a": [2]}, "F32", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_step_merges_by_layer_where_asked_and_proves_it_by_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter_run(tmp_path, monkeypatch)
    assert merge() == 0
    before = files.sha256_file(MERGED / "model.safetensors")
    in_memory = {p.name: files.sha256_file(p) for p in MERGED.iterdir()}
    assert merge("--force", "--set", "merge.by_layer=true") == 0
    assert "one tensor at a time (merge.by_layer)" in capsys.readouterr().err
    note = files.read_json(MERGED / merge_step.NOTE)
    assert note["by_layer"] and note["proof"]["mean_difference"] < 1e-4 < 0.5 < note["proof"]["adapter_effect"]
    from safetensors.torch import load_file

    assert load_file(MERGED / "model.safetensors").keys() and set(in_memory) == {p.name for p in MERGED.iterdir()}
    assert before  # the tensors are compared one by one above; the order of them in the file is the writer's own


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_a_model_larger_than_the_memory_is_merged_by_layer_and_its_tensors_are_compared(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter_run(tmp_path, monkeypatch, mode=mode)
    monkeypatch.setattr(merging, "_memory", lambda quantised: ("cpu", 1000))
    assert merge() == 0
    shown = capsys.readouterr()
    assert "0.0 GiB are free" in shown.err and "too large to be run here" in shown.err
    assert "its answers were not" in shown.out and "read back equal" in shown.out
    assert files.read_json(MERGED / merge_step.NOTE)["proof"]["changed"] == 14
    assert merge() == 0
    assert "up to date" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    shutil.move(MERGED, "by-layer")
    enter_again(monkeypatch)
    assert merge() == 0
    from safetensors.torch import load_file

    mine, its = load_file("by-layer/model.safetensors"), load_file(MERGED / "model.safetensors")
    assert mine.keys() == its.keys() and all(bool((mine[name] == its[name]).all()) for name in its)


def enter_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.utils import environment

    monkeypatch.setattr(environment, "_HEAVY", ())


@pytest.mark.slow
def test_a_full_run_has_nothing_to_merge_and_make_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter_run(tmp_path, monkeypatch)
    stamp.write(RUN, {**stamp.require(RUN), "tuning": {"mode": "full"}})
    assert merge() == 2
    assert merge("--if-adapter") == 0
