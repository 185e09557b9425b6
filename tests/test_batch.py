"""Batch: every data set with every config, each in its own folder; one failure never stops the rest."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import ROOT, environment, run, script

CONFIG = f"include: {ROOT / 'configs' / 'base.yaml'}\nmodel:\n  name: embedded/smollm2-135m-instruct\n"


def write_rows(path: Path, count: int = 30) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"question": f"{path.stem} {n}?", "answer": f"{n}"}) + "\n" for n in range(count))
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three data sets, the second unusable, and two configs."""
    write_rows(tmp_path / "data" / "raw" / "a.jsonl")
    (tmp_path / "data" / "raw" / "broken.csv").write_text("x,y\n1,2\n")
    write_rows(tmp_path / "data" / "raw" / "with space.jsonl")
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(CONFIG)
    return tmp_path


def test_one_failure_never_stops_the_rest_and_the_table_tells(folder):
    done = script("batch", "--config", "one.yaml", "two.yaml", "--steps", "process", cwd=folder)
    assert done.returncode == 2  # that of the first run that failed
    assert done.stderr.splitlines()[-1] == "sft-batch: exit code 2"
    for name in ("a", "with-space"):
        assert (folder / "data" / "processed" / name / "train.jsonl").is_file()
    lines = {words[0]: words[1:] for line in done.stdout.splitlines() if len(words := line.split()) > 4}
    assert "4 of 6 runs ended well" in done.stdout
    assert lines["two-with-space"][:2] == ["ok", "0"]
    assert lines["one-broken"][:3] == ["process", "failed", "2"]
    assert lines["one-broken"][-1] == "outputs/one-broken/batch.log"
    assert "broken.csv" in (folder / "outputs" / "one-broken" / "batch.log").read_text()


def test_dry_run_shows_every_data_set_with_every_config_and_writes_nothing(folder):
    before = sorted(folder.rglob("*"))
    done = script("batch", "--config", "one.yaml", "two.yaml", "--dry-run", cwd=folder)
    assert done.returncode == 0
    names = [f"{config}-{data}" for config in ("one", "two") for data in ("a", "broken", "with-space")]
    assert [name for name in names if name not in done.stdout] == []
    assert sorted(folder.rglob("*")) == before


def test_yaml_names_data_configs_overrides_and_steps(folder):
    plan = "data: data/raw/a.jsonl\nconfigs: [two.yaml]\nset: [data.name=renamed, 'style.text=be brief']\nsteps: [style, process]\n"
    (folder / "plan.yaml").write_text(plan)
    done = script("batch", "plan.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    (styled,) = (folder / "data" / "processed_with_style").iterdir()
    assert styled.name == "renamed"
    assert json.loads((styled / "manifest.json").read_text())["settings"]["text"] == "be brief"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "one.yaml", "no.yaml", "--data", "data/raw", "gone"], ["no.yaml", "gone"]),
        (["plan.yaml"], ["plan.yaml:1", "'config'", "'configs'"]),
        (["--set", "train.epocs=1"], ["train.epocs", "train.epochs"]),
        (["--steps", "trian"], ["trian"]),
        (["nowhere.yaml"], ["nowhere.yaml"]),
    ],
)
def test_what_does_not_exist_is_said_before_anything_runs(folder, words, said):
    (folder / "plan.yaml").write_text("config: [one.yaml]\n")
    given = words if "--config" in words else [*words, "--config", "one.yaml"]
    before = sorted(folder.rglob("*"))
    done = script("batch", *given, cwd=folder)
    assert done.returncode == 2
    assert [text for text in said if text not in done.stderr] == []
    assert "Traceback" not in done.stderr
    assert sorted(folder.rglob("*")) == before


def test_two_data_sets_of_one_name_do_not_share_a_folder(folder):
    write_rows(folder / "other" / "a.jsonl", 20)
    words = ["--data", "data/raw/a.jsonl", "other/a.jsonl", "--config", "one.yaml", "--steps", "process"]
    done = script("batch", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    counts = [
        json.loads(path.read_text())["rows_in"] for path in (folder / "data" / "processed").glob("*/manifest.json")
    ]
    assert sorted(counts) == [20, 30]
    assert len([path for path in (folder / "outputs").iterdir() if path.name != "sweeps"]) == 2


def test_stopped_by_a_signal_it_ends_the_child_and_still_shows_the_table(folder):
    write_rows(folder / "big" / "big.jsonl", 400_000)
    words = ["--data", "big/big.jsonl", "data/raw/a.jsonl", "--config", "one.yaml", "--steps", "process"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "batch.py", *words],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = folder / "outputs" / "one-big" / "batch.log"
    while not (log.exists() and log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "not run" in out
    assert not (folder / "data" / "processed" / "a").exists()


def test_the_workflow_runs_the_same_program(folder):
    done = run([ROOT / "workflows" / "batch_process.sh", "--config", "one.yaml", "--dry-run"], folder)
    assert done.returncode == 0, done.stderr
    assert "one-a" in done.stdout


@pytest.mark.slow
def test_the_table_shows_the_metrics_of_this_very_run(project: Callable[..., Path]):
    folder = project()
    words = ["--config", "tiny.yaml", "--set", "train.max_steps=2 eval.max_new_tokens=4"]
    done = script("batch", *words, cwd=folder)
    assert done.returncode == 0, done.stderr + (folder / "outputs" / "tiny-sums" / "batch.log").read_text()
    tuned = json.loads((folder / "outputs" / "tiny-sums" / "eval" / "metrics.json").read_text())["tuned"]
    assert f"{tuned['loss']:.4f}" in done.stdout
