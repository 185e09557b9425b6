"""The bundle holds what a report needs, and none of what was planted: tokens, rows, words of the user."""

import base64
import html
import json
import subprocess
import sys
import urllib.parse
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts import support_bundle
from scripts.utils import bundle, files, growing
from tests.commands import ROOT, run, script

FILES = {"README.txt", "check.json", "stamp.json", "config.yaml", "log.txt", "metrics.jsonl", "packages.txt", "nvidia-smi.txt", "machine.json"}  # fmt: skip
HUB, WANDB = "hf_" + "Qz8" * 11, "0123456789abcdef0123" * 2
AWS_ID, AWS_KEY = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
PASSWORD, OWN = "s3cr3t~pass.word", 'my "own" päss/word\\1'
PLANTED = {"hub": HUB, "wandb": WANDB, "AWS id": AWS_ID, "AWS key": AWS_KEY, "password": PASSWORD, "own": OWN}
ROW, STYLE = (
    "the parcel of Mrs Example is late",
    "You are the parcel desk of Example Ltd.\nBe brief and never mention Mr X.",
)


def spellings(secret: str) -> set[str]:
    quoted = urllib.parse.quote(secret, safe="")
    return {
        secret, quoted, urllib.parse.quote(quoted, safe=""), urllib.parse.quote(secret), urllib.parse.quote_plus(secret),
        json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], json.dumps(json.dumps(secret))[1:-1],
        html.escape(secret), base64.b64encode(secret.encode()).decode(),
    }  # fmt: skip


def survivors(parts: dict[str, str], secrets: dict[str, str]) -> list[tuple[str, str]]:
    return [
        (name, what)
        for name, text in parts.items()
        for what, s in secrets.items()
        if any(w in text for w in spellings(s))
    ]


SHARED = "You answer for Example Industries."


def make_run(folder: Path, name: str = "try1") -> Path:
    """A run's folder with secrets wherever a careless tool or person may leave one."""
    where = folder / "outputs" / name
    where.mkdir(parents=True)
    stamp = {
        "run": name, "status": "unfinished", "backend": {"requested": "unsloth", "actual": "bitsandbytes", "fallback_reason": f"login {OWN} failed"},
        "model": {"name": f"https://bob:{PASSWORD}@hub.example/m", "revision": "ab" * 20, "path_hash": "cd" * 32}, "git": {"commit": "ef" * 20, "dirty": True},
        "style": {"text": STYLE, "mode": "replace"}, "system": SHARED, "starts": [{"at": "2026-01-01T00:00:00Z", "ended": f"failed: {HUB} in /home/alice/data"}],
    }  # fmt: skip
    (where / "backend.json").write_text(json.dumps(stamp))
    from scripts.utils.config import to_yaml
    from scripts.utils.schema import Config

    given = {
        "style": {"text": STYLE},
        "data": {"raw": f"/home/alice/{HUB}/rows.jsonl"},
        "infer": {"stop": ["Mrs Example"]},
    }
    (where / "config.yaml").write_text(to_yaml(Config.model_validate(given)))
    log = [
        f"train: fetching https://bob:{PASSWORD}@hub.example/m?key={urllib.parse.quote(AWS_KEY, safe='')}",
        f"train: WANDB_API_KEY={WANDB} {AWS_ID}", f"error: {json.dumps(OWN)} and {urllib.parse.quote(OWN, safe='')}",
        f"\x1b[31mwarning:\x1b[0m wandb says {WANDB}", f"  prompt     {ROW}", ROW, f"infer: system message, as in training: {STYLE.splitlines()[0]}",
        'Traceback (most recent call last):', '  File "/home/alice/sft/scripts/train.py", line 1, in work', f"ValueError: {HUB}",
        "train: step 40/200  loss 1.83  2,310 tok/s",
    ]  # fmt: skip
    (where / "batch.log").write_text("\n".join(log) + "\n")
    (where / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.25}\n')
    (where / "eval").mkdir()
    (where / "eval" / "samples.jsonl").write_text(json.dumps({"prompt": ROW}) + "\n")
    (where / "adapter_model.safetensors").write_bytes(b"weights")
    return where


def read(path: Path) -> dict[str, str]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name).decode() for name in archive.namelist()}


@pytest.mark.slow
def test_a_bundle_holds_what_a_report_needs_and_no_secret_and_no_row(tmp_path):
    make_run(tmp_path)
    raw = tmp_path / "data" / "raw" / "rows.jsonl"
    raw.parent.mkdir(parents=True)
    raw.write_text(json.dumps({"question": ROW, "answer": "yes"}) + "\n")
    (tmp_path / "run.yaml").write_text(
        f"include: {ROOT / 'configs' / 'base.yaml'}\ntuning: {{mode: lora}}\nstyle: {{text: {STYLE.splitlines()[0]!r}}}\n"
    )
    secrets = {
        "HF_TOKEN": HUB,
        "WANDB_API_KEY": WANDB,
        "AWS_ACCESS_KEY_ID": AWS_ID,
        "AWS_SECRET_ACCESS_KEY": AWS_KEY,
        "MY_PASSWORD": OWN,
    }
    more = {
        "HF_ENDPOINT": f"http://bob:{PASSWORD}@127.0.0.1:9",
        "HF_HUB_OFFLINE": "",
        "SFT_STYLE": STYLE,
        "SFT_RUN": "try1",
    }
    done = script("support_bundle", "--config", "run.yaml", cwd=tmp_path, **secrets, **more)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "outputs" / "support-try1.zip"
    parts = read(path)
    assert set(parts) == FILES
    assert (
        survivors(
            parts,
            {
                **PLANTED,
                "row": ROW,
                "style": STYLE.splitlines()[0],
                "style, line 2": STYLE.splitlines()[1],
                "system": SHARED,
            },
        )
        == []
    )
    assert "alice" not in "".join(parts.values()) and "Mrs Example" not in "".join(parts.values())
    check = json.loads(parts["check.json"])
    assert {"packages", "attention", "data", "rows"} <= {finding["topic"] for finding in check["findings"]}
    stamp = json.loads(parts["stamp.json"])
    assert (stamp["backend"]["actual"], stamp["git"]["commit"], stamp["model"]["path_hash"]) == (
        "bitsandbytes",
        "ef" * 6,
        "cd" * 32,
    )
    assert (
        "step 40/200  loss 1.83" in parts["log.txt"]
        and "ValueError: ***" in parts["log.txt"]
        and "/scripts/train.py" in parts["log.txt"]
    )
    assert '"loss": 1.25' in parts["metrics.jsonl"] and "torch==" in parts["packages.txt"]
    assert "  text: (left out)\n" in parts["config.yaml"] and "learning_rate: 0.0002" in parts["config.yaml"]
    machine = json.loads(parts["machine.json"])
    assert machine["variables"]["HF_TOKEN"] == "(set)" and machine["variables"]["WANDB_API_KEY"] == "(set)"
    for name in FILES:  # listed before it is written
        assert name in done.stdout
    assert done.stdout.splitlines()[-2].startswith(f"{Path('outputs/support-try1.zip')}: 9 files")


def test_a_bundle_is_made_where_nothing_is_installed_and_the_config_is_broken(tmp_path):
    (tmp_path / "broken.yaml").write_text("train: [")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty"], check=True)
    words = [tmp_path / "empty" / "bin" / "python", ROOT / "scripts" / "support_bundle.py", "--config", "broken.yaml"]
    done = run(words, tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "outputs").glob("support-*.zip")
    parts = read(path)
    assert set(parts) == FILES
    assert "package-missing" in parts["check.json"]
    assert parts["config.yaml"].startswith("could not be made: ")


def test_a_run_is_checked_with_the_config_that_it_had_unless_another_is_named(tmp_path, monkeypatch):
    make_run(tmp_path)
    monkeypatch.chdir(tmp_path)

    def flags(*words: str) -> list[str]:
        return support_bundle.flags(support_bundle.build_parser().parse_args(words), "try1")

    assert flags() == ["--config=outputs/try1/config.yaml", "--run=try1"]
    assert flags("--config", "mine.yaml") == ["--config=mine.yaml", "--run=try1"]
    monkeypatch.setenv("SFT_CONFIG", "other.yaml")
    assert flags() == ["--config=other.yaml", "--run=try1"]


def test_a_run_that_is_not_there_is_said_and_nothing_is_written(tmp_path):
    done = script("support_bundle", cwd=tmp_path, SFT_RUN="nothing")
    assert done.returncode == 2 and "there is no run 'nothing'" in done.stderr
    assert list(tmp_path.iterdir()) == []


TOKENS = st.one_of(
    st.text(st.sampled_from("ABCabc0189"), min_size=30, max_size=36).map(lambda s: f"hf_{s}"),
    st.text(st.sampled_from("0123456789abcdef"), min_size=40, max_size=40),
    st.text(st.sampled_from("ABCD2345"), min_size=16, max_size=16).map(lambda s: f"AKIA{s}"),
    st.text(st.sampled_from("abcXYZ019+/=.~!# ä\"'\\"), min_size=8, max_size=30)
    .map(str.strip)
    .filter(lambda s: len(s) >= 8),
)


@settings(max_examples=30)
@given(
    token=TOKENS,
    how=st.sampled_from([str, lambda s: json.dumps(s)[1:-1], lambda s: urllib.parse.quote(s, safe=""), html.escape]),
)
def test_a_token_of_this_machine_survives_in_no_file_of_the_bundle(token, how, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    where = make_run(folder)
    written = how(token)
    for name in ("batch.log", "config.yaml", "metrics.jsonl"):
        with (where / name).open("a") as file:
            file.write(f"train: a {written} b\n{written}\nerror: {written}\n")
    stamp = files.read_json(where / "backend.json")
    files.write_json(where / "backend.json", {**stamp, token: [token, {"x": written}]})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SOME_API_TOKEN", token)
        patch.setenv("HF_HOME", f"/data/{written}")
        patch.setattr(bundle, "run_check", lambda words: f"check says {written}\n")
        parts = bundle.collect("try1", [], lambda: written)
    assert survivors(parts, {"token": token}) == []


def test_the_system_message_leaves_the_config_however_yaml_writes_it():
    from scripts.utils.config import to_yaml
    from scripts.utils.schema import Config

    for text in (STYLE, "short", "- a list?\n  - of lines", "x" * 300, "key: value\nother: 'quoted'", "ä\n\n\nb", None):
        config = Config.model_validate({"style": {"text": text}, "infer": {"stop": ["END", "two\nlines"]}})
        left = bundle.without_style(to_yaml(config))
        import yaml

        known = yaml.safe_load(left)
        assert known["style"] == {"text": "(left out)" if text else None, "mode": "replace"}
        assert known["infer"]["stop"] == "(left out)" and known["train"]["epochs"] == 3.0


def test_the_end_of_a_long_log_is_read_without_reading_all_of_it(tmp_path):
    path = tmp_path / "long.log"
    path.write_text("".join(f"train: step {n}\n" for n in range(100_000)) + "train: \x1b[32mlast\x1b[0m\n")
    assert growing.tail(path, 3) == ["train: step 99998", "train: step 99999", "train: last"]
    assert growing.tail(path, 10**6)[0].startswith("train: step "), "no half line"
    assert growing.tail(tmp_path / "none.log", 3) == []
