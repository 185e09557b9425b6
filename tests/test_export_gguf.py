"""GGUF files: the model's numbers, tokens and template, as a real runtime (xllamacpp) and transformers read them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from scripts import export_gguf, export_ollama
from scripts import merge as merge_step
from scripts.utils import (
    chat,
    files,
    gguf_export,
    gguf_model,
    gguf_runtime,
    gguf_tokenizer,
    merge_proof,
    modelfile,
)
from scripts.utils.errors import RefusedError, UserError
from tests import go_subset
from tests.tiny_models import CHATS, RUN, enter_run, smollm2_tokenizer

pytest.importorskip("gguf", reason="make install EXTRAS=gguf")
needs_runtime = pytest.mark.skipif(not gguf_runtime.installed(), reason="make install EXTRAS=gguf")

KINDS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}
TEXT = "Parcel 12 to Oslo is late, since Tuesday. Where is it?"


def write_model(folder: Path, name: str, *, tokenizer: Any = None, **extra: Any) -> Any:
    """A random model of a family with SmolLM2's tokenizer (or another) in ``folder``; weights large enough to matter."""
    import torch
    import transformers

    tokenizer = tokenizer or smollm2_tokenizer()
    config = getattr(transformers, f"{KINDS[name]}Config")(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **extra,
        }
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{KINDS[name]}ForCausalLM")(config).eval()
    for parameter_name, weight in model.named_parameters():
        if weight.ndim == 1:  # norms of one and biases of nothing would hide a wrong name
            torch.nn.init.normal_(weight, mean=1.0 if "norm" in parameter_name else 0.0, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def write_gguf(
    folder: Path, quant: str = "f32", template: chat.Template | None = None
) -> tuple[Path, gguf_export.Plan]:
    tokenizer = chat.load_tokenizer(folder)
    template = template or chat.choose_template(tokenizer, "auto")
    plan = gguf_export.plan(folder, tokenizer, template, [2], "a test")
    path = folder / f"m-{quant}.gguf"
    gguf_export.write(plan, path, quant)
    return path, plan


def largest_gap(model: Any, path: Path, tokenizer: Any, text: str = TEXT) -> float:
    """Largest difference of a likely next token's log-probability between transformers and the runtime."""
    ids = tokenizer(text)["input_ids"]
    prompts = [ids[:count] for count in (1, 2, 5, len(ids))]
    found = gguf_runtime.ask(path, prompts=prompts, texts=[], chats=[], context=256)["next"]
    gaps = []
    for prompt, likely in zip(prompts, found, strict=True):
        ours = merge_proof.log_probabilities(model, prompt)[-1]
        gaps += [abs(float(ours[int(number)]) - value) for number, value in likely.items()][:10]
    return max(gaps)


@needs_runtime
@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "tie_word_embeddings": False}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 32}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
                }
            },
        ),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"tie_word_embeddings": False}),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64,
                }
            },
        ),
        ("qwen3", {"head_dim": 32}),
        ("smollm3", {}),
    ],
    ids=["llama", "biases", "wide heads", "linear", "llama3", "mistral", "qwen2", "yarn", "qwen3", "smollm3"],
)  # fmt: skip
def test_a_runtime_computes_what_transformers_does(name: str, extra: dict[str, Any], tmp_path: Path) -> None:
    model = write_model(tmp_path, name, **extra)
    path, plan = write_gguf(tmp_path)
    assert gguf_export.compare_tensors(path, plan, "f32") == {"tensors": len(plan.shapes), "largest_difference": 0.0}
    assert largest_gap(model, path, smollm2_tokenizer()) < 1e-3


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_file_back_to_the_same_logits(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    # transformers takes 128 for the size of Qwen3's heads, whatever the file says
    extra = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 128}}.get(name, {})
    model = write_model(tmp_path, name, **extra)
    path, plan = write_gguf(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).eval()
    ids = smollm2_tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert float((again(ids).logits - model(ids).logits).abs().max()) < 1e-3
        gguf_export.load_into(model, path, plan)
        assert float((again(ids).logits - model(ids).logits).abs().max()) < 1e-3


@pytest.mark.parametrize("quant", sorted(gguf_export.KINDS))
def test_each_kind_of_number_loses_no_more_than_it_says(quant: str, tmp_path: Path) -> None:
    import gguf

    write_model(tmp_path, "llama", intermediate_size=80)  # 80 is no multiple of a block: down_proj becomes f16
    path, plan = write_gguf(tmp_path, quant)
    off = gguf_export.compare_tensors(path, plan, quant)["largest_difference"]
    assert off <= gguf_export.KINDS[quant][1] and (off > 0) == (quant != "f32")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == quant.upper() and kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] == {"q8_0": "F16"}.get(quant, quant.upper())


def test_weights_beyond_f16_are_refused_with_the_way_out(tmp_path: Path) -> None:
    import torch

    model = write_model(tmp_path, "llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="beyond what f16 holds") as caught:
        write_gguf(tmp_path, "f16")
    assert "bf16" in caught.value.hint
    write_gguf(tmp_path, "bf16")


def test_a_damaged_file_is_found_when_it_is_read_back(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    path, plan = write_gguf(tmp_path, "f16")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000] + bytes(1000))
    with pytest.raises(RefusedError, match="differs from the model"):
        gguf_export.compare_tensors(path, plan, "f16")
    for broken in (whole[: len(whole) // 2], whole[:100], b"", b"GGUF" + bytes(60), whole.replace(b"blk.3", b"blk.9")):
        path.write_bytes(broken)
        with pytest.raises(RefusedError, match=r"not a readable GGUF|are not the model's"):
            gguf_export.compare_tensors(path, plan, "f16")


@needs_runtime
def test_a_file_that_the_runtime_cannot_load_is_refused_and_not_fatal(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(RefusedError, match="does not run it"):
        gguf_runtime.ask(path, prompts=[[1]], texts=[], chats=[], context=64)


# --- what is refused


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "phi3"])
def test_other_kinds_of_models_are_refused_with_the_way_out(family: str, tmp_path: Path) -> None:
    from tests.tiny_models import tiny

    tiny(family, vocab=len(smollm2_tokenizer())).save_pretrained(tmp_path)
    smollm2_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not exported to GGUF here") as caught:
        write_gguf(tmp_path)
    assert "CONVERTER" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "extra", "text"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "every fourth"),
        ("llama", {"vocab_size": 49_000}, "embeddings have 49,000 rows"),
    ],
)
def test_settings_that_a_runtime_would_compute_otherwise_are_refused(
    name: str, extra: dict[str, Any], text: str, tmp_path: Path
) -> None:
    write_model(tmp_path, name, **extra)
    with pytest.raises(UserError, match=text):
        write_gguf(tmp_path)


def test_a_sliding_window_limits_the_context_that_the_file_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path, "mistral", sliding_window=32)
    _, plan = write_gguf(tmp_path)
    assert plan.model.context == 32 and "looks back 32 tokens" in capsys.readouterr().err


# --- tokenizers

NASTY = [
    "Hello, world! It's 2024, they'll say 'don't' — IT'S fine.",
    "Café déjà vu, Straße, 日本語のテキスト, Русский, العربية 🙂👩‍👩‍👧",
    "  leading, trailing  \n\n\ttabs\t and\r\nlines   \n",
    "def f(x):\n    return {'a': [1, 22, 333, 4444]}  # comment\n",
    "<|im_start|>user\nhi<|im_end|>",
    "a" * 50 + "1234567890" * 3,
    "",
    " ",
    "'S 'T 'RE x's",
]


def trained_tokenizer(rule: str) -> Any:
    """A small BPE tokenizer that cuts text by ``rule``, trained on the project's own words."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    text = [(files.REPO_ROOT / name).read_text() for name in ("README.md", "scripts/train.py", "docs/data.md")] + NASTY
    if rule == "sentencepiece":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        byte_tokens = [f"<0x{number:02X}>" for number in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=[*special, *byte_tokens], show_progress=False)
        tokenizer.train_from_iterator([word for part in text for word in part.split()], trainer)
        parts = json.loads(tokenizer.to_str())
        parts["added_tokens"] = [entry for entry in parts["added_tokens"] if entry["content"] in special]
        tokenizer = Tokenizer.from_str(json.dumps(parts))
    else:
        steps: list[Any] = []
        for kind, value in gguf_tokenizer._RULES[rule]:
            steps.append(
                pre_tokenizers.Digits(individual_digits=True)
                if kind == "Digits"
                else pre_tokenizers.Split(Regex(value), "isolated")
                if kind == "Split"
                else pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=value)
            )
        tokenizer = Tokenizer(models.BPE(ignore_merges=rule in ("llama-bpe", "tekken")))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@needs_runtime
@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "sentencepiece"])
def test_a_runtime_cuts_text_into_the_same_tokens(rule: str, tmp_path: Path) -> None:
    tokenizer = trained_tokenizer(rule)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    write_model(tmp_path, "llama", tokenizer=tokenizer, vocab_size=len(tokenizer) + 3)
    path, plan = write_gguf(tmp_path)
    assert plan.words.rule == {"sentencepiece": "default"}.get(rule, rule)
    assert plan.words.tokens[-1].startswith("[PAD")
    found = gguf_runtime.ask(path, prompts=[], texts=NASTY, chats=[], context=64)["ids"]
    ours = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in NASTY]
    assert found == ours


@needs_runtime
@pytest.mark.parametrize("name", ["auto", "chatml", "plain", "llama3", "gemma", "alpaca"])
def test_a_runtime_makes_the_runs_text_of_a_conversation(name: str, tmp_path: Path) -> None:
    """Templates of ours carry transformers' own generation tags, which no other engine knows."""
    write_model(tmp_path, "llama")
    tokenizer = chat.load_tokenizer(tmp_path)
    template = chat.choose_template(tokenizer, name)
    path, plan = write_gguf(tmp_path, template=template)
    assert "generation %}" not in plan.words.template.replace("add_generation", "")
    talk = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "One\nTwo"},
        {"role": "assistant", "content": '{"a": 1}'},
        {"role": "user", "content": "Three"},
    ]
    found = gguf_runtime.ask(path, prompts=[], texts=[], chats=[talk, talk[1:]], context=64)["chats"]
    assert found == [chat.render_prompt(template, tokenizer, part).text for part in (talk, talk[1:])]


def test_tokenizers_that_gguf_cannot_describe_are_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    odd = Tokenizer(models.BPE(vocab={"a": 0, "<s>": 1}, merges=[]))
    odd.pre_tokenizer = pre_tokenizers.Whitespace()
    words = Tokenizer(models.WordLevel(vocab={"a": 0, "<s>": 1}, unk_token="a"))
    for tokenizer, text in ((odd, "by a rule that has no name"), (words, "not BPE")):
        whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")
        whole.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        with pytest.raises(UserError, match=text):
            gguf_tokenizer.describe(whole, chat.choose_template(whole, "auto"), 2, [1])


def test_reordering_for_a_runtime_is_undone_exactly() -> None:
    import numpy as np

    values = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
    turned = gguf_model.to_neighbours(values, 2)
    assert turned[:4, 0].tolist() == [0, 12, 6, 18]
    assert (gguf_model.to_halves(turned, 2) == values).all()
    assert (gguf_model.to_halves(gguf_model.to_neighbours(values[:, 0], 2), 2) == values[:, 0]).all()


# --- the whole step

GGUF = Path(f"outputs/{RUN}/gguf")


@pytest.fixture
def merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter_run(tmp_path, monkeypatch)
    assert merge_step.main(["--config", "c.yaml"]) == 0
    return tmp_path


def export(*flags: str) -> int:
    return export_gguf.main(["--config", "c.yaml", *flags])


@pytest.mark.slow
@needs_runtime
def test_the_step_writes_a_proven_file_and_is_up_to_date_afterwards(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export() == 0
    shown = capsys.readouterr()
    proof = files.read_json(GGUF / f"{RUN}-f16.json")["proof"]
    assert proof["logits"]["mean_difference"] < 0.01 and proof["runtime"]["mean_difference"] < 0.02
    assert proof["runtime"]["same_ids"] == proof["runtime"]["texts"] > 4
    assert proof["runtime"]["same_chats"] == proof["runtime"]["chats"] == 3
    assert "xllamacpp" in shown.err and "places" in shown.out
    before = files.sha256_file(GGUF / f"{RUN}-f16.gguf")
    assert export() == 0
    assert "up to date" in capsys.readouterr().err
    assert export("--force") == 0
    assert files.sha256_file(GGUF / f"{RUN}-f16.gguf") == before, "the same model gives the same bytes"
    assert not list(GGUF.glob(".new*"))
    assert export("--quant", "q8_0", "--set", "merge.tolerance=1") == 0
    assert {path.name for path in GGUF.glob("*.gguf")} == {f"{RUN}-f16.gguf", f"{RUN}-q8_0.gguf"}


@pytest.mark.slow
@needs_runtime
def test_the_runtime_answers_the_runs_questions_as_it_was_taught(merged: Path) -> None:
    import xllamacpp

    assert export() == 0
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(GGUF / f"{RUN}-f16.gguf")
    parameters.n_ctx = 256
    parameters.verbosity = -1
    server = xllamacpp.Server(parameters)
    for question, answer in CHATS:
        got = server.handle_chat_completions(
            {"messages": [{"role": "user", "content": question}], "max_tokens": 24, "temperature": 0}
        )
        assert got["choices"][0]["message"]["content"] == answer
        assert got["choices"][0]["finish_reason"] == "stop"


@pytest.mark.slow
def test_a_fully_tuned_run_is_exported_from_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter_run(tmp_path, monkeypatch, mode="full")
    assert export("--quant", "f32") == 0
    assert (GGUF / f"{RUN}-f32.gguf").is_file()


@pytest.mark.slow
def test_wrong_numbers_never_land(
    merged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export() == 0
    before = files.sha256_file(GGUF / f"{RUN}-f16.gguf")
    monkeypatch.setattr(gguf_model, "to_neighbours", lambda values, heads: values)
    assert export("--force") == 3
    assert "differs from the model" in capsys.readouterr().err
    # a fault that reading back with the same tables cannot see: only the runtime does
    monkeypatch.setattr(gguf_model, "to_halves", lambda values, heads: values)
    if gguf_runtime.installed():
        assert export("--force") == 3
        assert "the runtime (xllamacpp) does not answer as the model does" in capsys.readouterr().err
    assert files.sha256_file(GGUF / f"{RUN}-f16.gguf") == before
    assert not list(GGUF.glob(".new*"))


@pytest.mark.slow
def test_without_a_runtime_the_report_says_that_none_was_run(
    merged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gguf_runtime, "installed", lambda: False)
    assert export() == 0
    assert "not run here" in capsys.readouterr().out


@pytest.mark.slow
def test_bad_input_is_told_with_its_own_code_and_earlier_files_stay(
    merged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    def fails(code: int, text: str, *flags: str) -> None:
        capsys.readouterr()
        assert export(*flags) == code
        error = capsys.readouterr().err
        assert text in error and "Traceback" not in error, error

    fails(2, "there is no run 'nowhere'", "--run", "nowhere")
    fails(2, "QUANT=q4_9 is not known", "--quant", "q4_9")
    fails(2, "there is no file", "--converter", "no/such/convert.py")
    (GGUF).mkdir()
    (GGUF / f"{RUN}-f16.gguf").write_bytes(b"mine")
    fails(3, "was not written by this step")
    assert (GGUF / f"{RUN}-f16.gguf").read_bytes() == b"mine"
    (GGUF / f"{RUN}-f16.gguf").unlink()
    assert export() == 0
    before = files.sha256_file(GGUF / f"{RUN}-f16.gguf")
    weights = Path(f"adapters/{RUN}/adapter_model.safetensors")
    kept = weights.read_bytes()
    save_file({name: value / 2 for name, value in load_file(weights).items()}, weights)
    fails(3, "merged from another adapter")
    weights.write_bytes(kept)
    from scripts.utils import gguf_proof

    with monkeypatch.context() as patch:
        patch.setattr(gguf_proof.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        fails(4, "are free", "--force")
    (GGUF.parent / "merged" / "config.json").write_text("{}")
    fails(3, "is not as it was merged", "--force")
    shutil.rmtree(GGUF.parent / "merged")
    fails(2, f"make merge RUN={RUN}")
    assert files.sha256_file(GGUF / f"{RUN}-f16.gguf") == before


@pytest.mark.slow
def test_a_converter_of_the_users_is_run_and_its_file_is_proven_too(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for llama.cpp's script: the same arguments; it writes by our writer, fails, or writes something else."""
    header = "import sys\nfolder, out, kind = sys.argv[1], sys.argv[3], sys.argv[5]\n"
    good = (
        f"{header}sys.path.insert(0, {str(files.REPO_ROOT)!r})\n"
        "from pathlib import Path\nfrom scripts.utils import chat, gguf_export\n"
        "tokenizer = chat.load_tokenizer(Path(folder))\n"
        "plan = gguf_export.plan(Path(folder), tokenizer, chat.choose_template(tokenizer, 'auto'), [2], 'x')\n"
        "gguf_export.write(plan, Path(out), kind)\n"
    )
    Path("convert.py").write_text(good)
    assert export("--converter", "convert.py", "--quant", "f32") == 0
    assert "convert.py" in capsys.readouterr().err
    before = files.sha256_file(GGUF / f"{RUN}-f32.gguf")
    for code, text, script in (
        (2, "the converter failed: ValueError: no such model", "raise ValueError('no such model')"),
        (2, "the converter failed", ""),
        (3, "not a readable GGUF file", f"{header}open(out, 'wb').write(b'GGUF nonsense')"),
    ):
        Path("convert.py").write_text(script)
        assert export("--converter", "convert.py", "--quant", "f32") == code
        assert text in capsys.readouterr().err
    assert files.sha256_file(GGUF / f"{RUN}-f32.gguf") == before


# --- Ollama


@pytest.mark.slow
def test_the_modelfile_names_the_newest_file_and_writes_the_runs_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.tiny_models import SYSTEM

    enter_run(tmp_path, monkeypatch, style=True)
    assert merge_step.main(["--config", "c.yaml"]) == 0
    assert export_ollama.main(["--config", "c.yaml"]) == 0
    path = Path(f"outputs/{RUN}/ollama/Modelfile")
    assert ("FROM", "../merged") in modelfile.read(path.read_text())
    assert export("--quant", "f32") == 0
    capsys.readouterr()
    assert export_ollama.main(["--config", "c.yaml", "--set", "infer.temperature=0.3"]) == 0
    assert "Ollama itself was not run" in capsys.readouterr().out
    found = modelfile.read(path.read_text())
    values = dict(found)
    assert (path.parent / values["FROM"]).resolve() == (GGUF / f"{RUN}-f32.gguf").resolve()
    assert values["SYSTEM"] == SYSTEM
    parameters = [value for name, value in found if name == "PARAMETER"]
    assert ("stop", "<|im_end|>") in parameters and ("temperature", 0.3) in parameters
    tokenizer = chat.load_tokenizer(Path(f"outputs/{RUN}/merged"))
    talk = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": CHATS[0][0]}]
    wanted = chat.render_prompt(chat.choose_template(tokenizer, "auto"), tokenizer, talk).text
    assert go_subset.render(values["TEMPLATE"], talk) == wanted


@pytest.mark.slow
def test_a_modelfile_is_refused_for_what_is_not_there_and_what_is_not_ours(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(code: int, text: str, *flags: str) -> None:
        assert export_ollama.main(["--config", "c.yaml", *flags]) == code
        assert text in capsys.readouterr().err

    fails(2, "there is no run", "--run", "nowhere")
    fails(2, "make export-gguf", "--quant", "q8_0")
    folder = Path(f"outputs/{RUN}/ollama")
    folder.mkdir()
    (folder / "Modelfile").write_text("mine")
    fails(3, "no step wrote it")
    assert (folder / "Modelfile").read_text() == "mine"
    shutil.rmtree(folder)
    (GGUF).mkdir()
    (GGUF / f"{RUN}-f16.gguf").write_bytes(b"of another model")
    fails(2, "is not of the model")
    shutil.rmtree(GGUF)
    template = Path(f"outputs/{RUN}/merged/chat_template.jinja")
    note = files.read_json(template.parent / merge_step.NOTE)
    template.write_text("{{ messages[-1].content }}")
    note["files"][template.name] = template.stat().st_size
    files.write_json(template.parent / merge_step.NOTE, note)
    fails(2, "cannot be written as a Go template")
    assert not folder.exists()
