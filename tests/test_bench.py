"""make bench: what is counted is counted right, tables and page say what was measured, and a small contest runs to its end."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import contestants, flops, inference, levers, loader, measured, plot, results, rows, steps, train
from benchmarks.contestants import Result
from scripts.utils.errors import MachineError, UserError
from tests.commands import ROOT, environment, run

RESULT = Result(
    name="sft-play", round=1, seconds=10, first_step=4, peak_bytes=100, rate=40, trained_rate=20, flops=1e9, steps=3,
    tokens=300, trained_tokens=150, train_loss=1.5,
)  # fmt: skip


def test_operations_of_a_tiny_model_are_those_counted_by_hand(tiny_model):
    shape = flops.shape_of(tiny_model, rank=4)
    # hidden 32, 4 heads of 8 and 2 for keys and values, intermediate 64, 2 layers
    layer = 32 * 32 + 2 * (32 * 16) + 32 * 32 + 3 * (32 * 64)
    adapter = 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64))
    assert (shape.frozen, shape.trained, shape.attention) == (2 * layer, 2 * adapter, 2 * 4 * 8)
    assert shape.head == 32 * 49152
    # two examples, of 2 and 3 tokens: 3 + 6 pairs of a token and what it sees; two tokens carry loss
    wanted = 5 * (4 * 2 * layer + 6 * 2 * adapter) + 2 * 4 * shape.head + 12 * 64 * 9
    assert shape.step([2, 3], 2) == wanted


def test_operations_agree_with_those_that_torch_counts(tiny_model):
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    # the adapter off, the first layer's input with a gradient: only what is frozen, attention over all pairs
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager").requires_grad_(False)
    hidden = torch.randn(1, 16, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=hidden, use_cache=False).logits.sum().backward()
    shape = replace(flops.shape_of(tiny_model, rank=4), trained=0)
    all_pairs = 12 * shape.attention * (16 * 16 - 16 * 17 // 2)
    # rotary positions are multiplied out as a small matrix product, which is not counted
    assert counter.get_total_flops() == pytest.approx(shape.step([16], 16) + all_pairs, rel=1e-3)


def test_medians_and_ratios_compare_the_right_way_round():
    runs = [replace(RESULT, round=n, rate=rate) for n, rate in enumerate((30, 50, 40), 1)]
    runs += [replace(RESULT, name="padded", rate=10, peak_bytes=400, seconds=25, first_step=2)]
    middle = results.medians(runs)
    assert middle["sft-play"]["rate"] == 40
    assert results.ratios(middle) == [
        {"ours": "sft-play", "peer": "padded", "rate": 4, "memory": 0.25, "total": 2.5, "first_step": 0.5}
    ]


def test_rates_leave_out_the_first_step():
    lines = ((0.5, "loading"), (4.0, "train: step 1/3  loss 1"), (5.0, "train: step 2/3"), (6.0, "train: step 3/3"))
    facts = {"tokens": [10, 40, 60], "trained_tokens": 55, "loss": 1.0, "steps": 3}
    shape = flops.Shape(frozen=1, trained=0, head=0, attention=0)
    found = contestants.evaluate("padded", 1, measured.Measured(9.0, 7, lines), facts, [55, 55], shape)
    assert (found.rate, found.trained_rate, found.first_step, found.seconds) == (50, 25, 4, 9)
    assert found.flops == 4 * 50
    with pytest.raises(MachineError, match="2 of 3"):
        contestants.evaluate("padded", 1, measured.Measured(9.0, 7, lines[:3]), facts, [55, 55], shape)


def contest() -> dict:
    middle = results.medians([RESULT, replace(RESULT, name="padded", rate=10)])
    return {
        "machine": "a machine", "date": "2026-01-01", "trl": "1", "rounds": 1, "limit": {"fp32": 4e9, "bf16": 8e9},
        "job": {"precision": "bf16"}, "rows": {"raw": "r", "count": 3, "held": 1, "tokens": 300, "trained": 150},
        "medians": middle, "ratios": results.ratios(middle), "held_out": {"base": 2, "sft-play": 1, "padded": 1},
    }  # fmt: skip


def test_the_table_takes_each_contestants_own_limit():
    text = results.contest_text(contest())
    (ours,) = re.findall(r"^\| SFT-Play \| 40.*", text, flags=re.M)
    (padded,) = re.findall(r"^\| padded .*", text, flags=re.M)
    assert "12%" in ours and "25%" in padded
    assert text.index("4.00×") < text.index("40.0")  # ratios first


def test_docs_replace_the_block_between_the_marks_and_nothing_else(tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
    found = contest()
    results.save(tmp_path / "out", "starts", {}, "### Starts\n")
    results.save(tmp_path / "out", "train-bf16", found, results.contest_text(found))
    for _ in range(2):  # the second time as the first
        assert results.update_docs(tmp_path / "out", page) == ["train-bf16", "starts"]
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("### Training in bf16") == text.count("### Starts") == 1
    assert "(benchmarks.svg)" in text and (tmp_path / "benchmarks.svg").is_file()


def test_docs_refuse_a_page_without_marks_and_a_folder_without_figures(tmp_path):
    with pytest.raises(UserError, match="no block"):
        results.with_figures("a page", "figures")
    with pytest.raises(UserError, match="no figures"):
        results.update_docs(tmp_path, tmp_path / "page.md")


def test_the_shipped_page_has_its_block():
    assert results.with_figures((ROOT / "docs" / "benchmarks.md").read_text(), "x").count(results.BEGIN) == 1


def test_the_plot_is_whole_xml_with_a_bar_a_ratio():
    from xml.etree import ElementTree

    drawn = plot.ratios_svg([contest()])
    bars = [e for e in ElementTree.fromstring(drawn).iter() if e.tag.endswith("rect")]
    assert len(bars) == 1 and "prefers-color-scheme: dark" in drawn


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "4"], "at least 16"),
        (["--rows", "many"], "at least 16"),
        (["--precision", "fp8"], "fp8"),
        (["--contestants", "sft-play,axolotl"], "axolotl is none of"),
        (["--prefix", "20,x"], "'x'"),
        (["--raw", "nowhere.json"], "nowhere.json is not there"),
    ],
)
def test_what_cannot_be_is_refused_at_once(words, said, tmp_path, capsys, monkeypatch):
    from scripts.utils import environment as prepared

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepared, "_HEAVY", ())
    try:
        code = train.main(words)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert said in capsys.readouterr().err


def test_make_hands_its_variables_over(monkeypatch):
    for name, value in {"ROWS": "32", "ROUNDS": "5", "PRECISION": "bf16", "RAW": "my rows.csv"}.items():
        monkeypatch.setenv(f"SFT_{name}", value)
    found = train.build_parser().parse_args([])
    assert (found.rows, found.rounds, found.precision, found.raw) == (32, 5, "bf16", "my rows.csv")


def test_a_contestant_inherits_none_of_makes_variables(monkeypatch):
    monkeypatch.setenv("SFT_RAW", "elsewhere")
    assert "SFT_RAW" not in rows.clean_environment()
    assert rows.clean_environment(PYTHONPATH="x")["PYTHONPATH"] == "x"


def test_a_failed_command_ends_the_benchmark_with_its_own_words(tmp_path):
    with pytest.raises(SystemExit, match="(?s)exit code 3.*its own words"):
        measured.run(["sh", "-c", "echo its own words; exit 3"], tmp_path)


def test_lines_carry_the_moment_when_they_were_said(tmp_path):
    done = measured.run(["sh", "-c", "echo one; sleep 0.3; echo two >&2"], tmp_path)
    (first, one), (second, two) = done.lines
    assert (one, two) == ("one", "two") and second - first >= 0.25
    assert (tmp_path / "log.txt").read_text() == "one\ntwo\n"


def test_trl_that_cannot_be_fetched_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(contestants, "ROOT", tmp_path)
    failed = SimpleNamespace(returncode=1, stderr="no route")
    monkeypatch.setattr(contestants.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(MachineError, match="no route") as caught:
        contestants.trl_folder()
    assert "--contestants" in caught.value.hint
    assert list((tmp_path / ".cache" / "bench").iterdir()) == []


def examples_of(model: Path, count: int) -> list:
    turns = [("user", "How much is {n} and {n}?"), ("assistant", "It is {n} twice.")]
    messages = [[{"role": role, "content": text.format(n=n)} for role, text in turns] for n in range(count)]
    return rows.encode(model, [{"messages": m} for m in messages], system="Answer as a patient teacher would.")


@pytest.mark.parametrize("variant", steps.VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_leaves_the_weights_as_it_found_them(variant, tiny_model):
    import torch

    job = rows.Job(str(tiny_model), "fp32", pack_length=200, max_length=128, rank=4)
    model = steps.load(job)
    before = [p.detach().clone() for p in model.parameters()]
    seconds, _ = steps.run_steps(model, [examples_of(tiny_model, 4)] * 2, variant, job)
    assert seconds > 0
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert model.config._attn_implementation == "sdpa" and not model.is_gradient_checkpointing


def test_each_way_of_answering_gives_the_same_text_in_fp32(tiny_model, monkeypatch):
    from scripts.utils import backends, chat

    monkeypatch.setattr(inference, "NEW_TOKENS", 4)
    model = backends.load_causal_lm(tiny_model, precision="fp32", device="cpu").eval()
    encoded = examples_of(tiny_model, 5)
    prompts = inference.prompts_of(rows.Rows([], [], encoded[:3], encoded[3:]))
    assert len(prompts) == 5 and all(len(p) < len(e.ids) for p, e in zip(prompts, encoded, strict=True))
    ways = inference.ways(model, chat.load_tokenizer(tiny_model), [2], prompts)
    batched, alone, plain = (way() for way in ways.values())
    assert batched == alone == plain and len(alone) == 5


def test_the_loader_is_timed_on_as_many_rows_as_were_asked_for(tiny_model, tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    given = rows.Rows([{"messages": turns}], [], examples_of(tiny_model, 1), [])
    asked = SimpleNamespace(loader=40, rounds=2, raw="few.jsonl", precision="fp32", max_length=128, mode="lora")
    title, found, text = loader.loader(asked, tmp_path, given, tiny_model)
    assert title == "loader" and found["rows"] == 40 and len(found["medians"]) == 3
    assert all(seconds > 0 for seconds in found["medians"].values()) and "40 rows" in text


@pytest.mark.parametrize("tokens", [20, 200])
def test_a_system_prompt_has_about_the_tokens_asked_for(tokens, tiny_model):
    text = levers.system_prompt(tiny_model, tokens)
    asked = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    without, behind = (len(rows.encode(tiny_model, [{"messages": asked}], given)[0].ids) for given in ("", text))
    assert abs(behind - without - tokens) <= 2


@pytest.mark.slow
def test_a_small_contest_runs_to_its_table(tmp_path, tiny_model):
    lines = [{"question": f"How much is {n} plus {n + 1}?", "answer": f"It is {2 * n + 1}."} for n in range(60)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = "--raw sums.jsonl --rows 24 --rounds 1 --max-length 128 --contestants sft-play,padded --out out".split()
    done = run(
        [
            Path(environment()["VIRTUAL_ENV"]) / "bin" / "python",
            "-m",
            "benchmarks.train",
            *words,
            "--model",
            tiny_model,
        ],
        tmp_path,
        timeout=900,
        PYTHONPATH=str(ROOT),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "train-fp32.json").read_text())
    ours, padded = found["runs"]
    # the same rows; the peer learns the line break after an answer too
    assert ours["tokens"] == padded["tokens"]
    assert ours["trained_tokens"] + 24 == padded["trained_tokens"]
    assert ours["tokens"] == found["rows"]["tokens"] and ours["trained_tokens"] == found["rows"]["trained"]
    assert found["held_out"]["sft-play"] != found["held_out"]["base"] != found["held_out"]["padded"]
    assert "| SFT-Play | padded Trainer, all logits, fp32 |" in done.stdout
