"""The doctor finds what was planted, names its mend, and survives what crashes: through the real command."""

import ast
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import jsonschema
import pytest

from scripts.utils import doctor_data, doctor_hub, doctor_machine, doctor_packages, trial
from scripts.utils.doctor_data import Looked
from scripts.utils.schema import Config, RenderSection
from tests.commands import ROOT, environment, run
from tests.planted import Environment, check, in_namespace, nvidia_smi

BASE = f"include: {ROOT / 'configs' / 'base.yaml'}\n"
SCHEMA = json.loads((ROOT / "docs" / "check.schema.json").read_text())
EMBEDDED = "embedded/smollm2-135m-instruct"


def write_rows(path: Path, count: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"How much is {n} plus {n}?", "answer": f"It is {2 * n}."} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with a config for the CPU and some rows; the embedded model is in the project's cache."""
    (tmp_path / "run.yaml").write_text(BASE + "tuning: {mode: lora}\n")
    write_rows(tmp_path / "data" / "raw" / "rows.jsonl")
    return tmp_path


@pytest.fixture
def planted(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


@pytest.mark.slow
def test_where_nothing_is_wrong_nothing_is_found(folder):
    found = check("--config", "run.yaml", cwd=folder)
    assert found.named.keys() <= {"memory-small", "few-open-files", "secrets-readable", "disk-small"}, found.named
    assert found.code == 0
    jsonschema.validate(found.told, SCHEMA)
    topics = [finding["topic"] for finding in found.findings]
    wanted = "python system disk memory access packages torch device attention bitsandbytes config hub token precision plan run data rendered backend rows"
    assert [topic for topic in wanted.split() if topic not in topics] == []
    assert not (folder / "outputs").exists() and not (folder / "adapters").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["data", "run.yaml"]


@pytest.mark.slow
def test_faults_of_packages_limits_and_config_are_each_found_with_their_mend(folder, planted, tmp_path):
    planted.without("bitsandbytes", "wandb", "unsloth", "deepspeed")
    planted.as_version("peft", "0.10.0")
    planted.asked_for("data wandb")
    token = tmp_path / "token"
    token.write_text("not a token of the hub")
    token.chmod(0o644)
    write_rows(folder / "given" / "train.jsonl")
    write_rows(folder / "given" / "val.jsonl", 3)
    settings = (
        "train.precision=fp16 tracking.report_to=[tensorboard,wandb] tuning.backend=unsloth render.max_length=8 "
        "infer.json_schema=none.json data.raw=given train.parallel=deepspeed"
    )
    path = f"{nvidia_smi(tmp_path / 'bin')}{os.pathsep}{os.environ['PATH']}"
    found = check(
        "--config", "run.yaml", "--set", settings, "--gpu-gb", "0.9", cwd=folder, python=planted.python, PATH=path,
        HF_TOKEN_PATH=str(token), HF_TOKEN="", before=lambda words: ["bash", "-c", 'ulimit -S -n 256; exec "$@"', "bash", *words],
    )  # fmt: skip
    assert found.code == 4
    jsonschema.validate(found.told, SCHEMA)
    mends = {
        "package-missing": "make install FORCE=1",
        "package-version": "make install FORCE=1",
        "extra-missing": "make install EXTRAS=wandb FORCE=1",
        "torch-without-cuda": "make install",
        "few-open-files": "ulimit -n ",
        "secrets-readable": "chmod 600 ",
        "file-missing": "infer.json_schema=null",
        "tracker-missing": "make install EXTRAS=wandb",
        "engine-missing": "make install EXTRAS=deepspeed",
        "precision-changed": "train.precision=auto",
        "memory-too-small": "",
        "unsloth-fails": "make install EXTRAS=unsloth",
        "split-missing": "eval.split=val",
        "rows-too-long": "render.max_length=",
    }
    assert {name: words for name, words in mends.items() if words not in found.mend(name)} == {}
    assert "bitsandbytes" in found.named["package-missing"]["text"]
    assert "peft 0.10.0" in found.named["package-version"]["text"]
    assert "RTX 4060" in found.named["torch-without-cuda"]["text"]
    assert found.state("bitsandbytes") == []  # what is missing is not tried
    assert found.state("attention") == ["ok"]


@pytest.mark.slow
def test_a_broken_library_and_an_old_driver_are_found(folder, planted, tmp_path):
    (library,) = (planted.site / "bitsandbytes").resolve().glob("libbitsandbytes_cpu.*")
    planted.with_file("bitsandbytes", library.name, "no library")
    version = (planted.site / "torch" / "version.py").read_text()
    planted.with_file("torch", "version.py", re.sub(r"(?m)^cuda\b.*$", "cuda = '13.0'", version))
    path = f"{nvidia_smi(tmp_path / 'bin', driver='535.104.05')}{os.pathsep}{os.environ['PATH']}"
    found = check("--config", "run.yaml", cwd=folder, python=planted.python, PATH=path)
    assert found.code == 4
    assert found.mend("bitsandbytes-broken").startswith("make install")
    assert "compiled library for cpu does not load" in found.named["bitsandbytes-broken"]["text"]
    assert "driver 580 or newer" in found.named["driver-too-old"]["text"]
    assert "update the NVIDIA driver" in found.mend("driver-too-old")
    assert "--gpus all" in found.mend("gpu-not-seen")


@pytest.mark.slow
def test_a_library_that_dies_or_hangs_becomes_a_line(folder, planted):
    (library,) = (planted.site / "bitsandbytes").resolve().glob("libbitsandbytes_cpu.*")
    planted.with_file("bitsandbytes", library.name, library.read_bytes()[:1000])
    hang = "import time\ntime.sleep(600)\n"
    planted.with_file("transformers", "__init__.py", hang)
    found = check("--config", "run.yaml", "--seconds", "12", cwd=folder, python=planted.python)
    assert found.code == 4
    assert re.search(
        r"ended by SIG(BUS|SEGV) while importing|does not load", found.named["bitsandbytes-broken"]["text"]
    )
    assert "did not end within 12 seconds, while importing transformers" in found.named["rows-crash"]["text"]
    assert found.mend("rows-crash")


def test_a_torch_that_dies_leaves_the_other_lines(folder, planted):
    planted.with_file("torch", "__init__.py", "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    found = check("--config", "run.yaml", cwd=folder, python=planted.python)
    assert found.code == 4
    assert "ended by SIGILL while importing torch" in found.named["torch-broken"]["text"]
    assert found.mend("torch-broken") == "make install"
    assert found.state("config") == ["ok"] and found.state("data") == ["ok"]


@pytest.mark.slow
def test_a_full_disk_and_folders_that_cannot_be_written_are_found(folder):
    for name in ("outputs", "adapters"):
        (folder / name).mkdir()
    before = in_namespace(
        "mount -t tmpfs -o size=8m tmpfs outputs && mount --bind adapters adapters && mount -o remount,ro,bind adapters"
    )
    if before is None:
        pytest.skip("file systems cannot be mounted here")
    (folder / "a file").touch()
    found = check("--config", "run.yaml", cwd=folder, before=before, SFT_MODEL_CACHE=str(folder / "a file"), SFT_MODEL="x/y", HF_ENDPOINT="http://127.0.0.1:9")  # fmt: skip
    assert found.code == 4
    assert "outputs" in found.named["disk-full"]["text"] and "make clean" in found.mend("disk-full")
    assert "adapters" in found.named["read-only"]["text"] and "remount" in found.mend("read-only")
    assert "mv " in found.mend("cache-unwritable")
    assert "download-model MODEL=x/y" in found.mend("model-missing")


@pytest.mark.slow
def test_a_file_in_the_place_of_a_folder_a_broken_template_and_no_loss_are_found(folder):
    (folder / "outputs").touch()
    (folder / "broken.jinja").write_text("{% for message in messages %}{{ message.content }")
    found = check("--config", "run.yaml", "--set", "render.template=broken.jinja", cwd=folder)
    assert found.code == 4
    assert found.mend("not-a-folder").startswith("move it away: mv ")
    assert "broken.jinja" in found.named["template-broken"]["text"]
    assert "render.template=auto" in found.mend("template-broken")
    (folder / "outputs").unlink()
    turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "first"}]
    last = [{"role": "user", "content": "b?"}, {"role": "assistant", "content": "second", "train": False}]
    (folder / "data" / "raw" / "rows.jsonl").write_text(json.dumps({"messages": turns + last}) + "\n")
    found = check("--config", "run.yaml", "--set", "render.train_on=last_assistant", cwd=folder)
    assert found.code == 2
    assert "train_on" in found.mend("mask-empty")


@pytest.mark.slow
def test_a_wrong_config_is_said_with_its_mend_and_the_users_code(folder):
    found = check("--config", "run.yaml", "--set", "train.lrr=1", cwd=folder)
    assert found.code == 2
    assert "train.learning_rate" in found.named["config-wrong"]["text"]
    (folder / "lost.yaml").write_text("include: nowhere.yaml\n")
    found = check("--config", "lost.yaml", cwd=folder)
    assert (found.code, "nowhere.yaml" in found.named["config-wrong"]["text"]) == (2, True)


def test_a_python_that_is_too_old_is_refused_before_the_project_is_read(folder, tmp_path):
    seam = tmp_path / "seam"
    seam.mkdir()
    (seam / "sitecustomize.py").write_text("import sys\nsys.version_info = (3, 9, 1)\n")
    done = run([sys.executable, ROOT / "scripts" / "check.py"], folder, PYTHONPATH=str(seam))
    assert done.returncode == 4
    assert "3.11 to 3.13 are supported" in done.stderr and "make install PYTHON=" in done.stderr
    assert done.stderr.splitlines()[-1] == "sft-check: exit code 4"


def test_before_anything_is_installed_the_machine_is_looked_at_and_the_rest_is_missing(folder):
    words = [sys.executable, "-S", str(ROOT / "scripts" / "check.py"), "--json"]  # -S: no site-packages
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    told = json.loads(done.stdout)
    jsonschema.validate(told, SCHEMA)
    named = {finding["name"]: finding for finding in told["findings"]}
    assert "torch" in named["package-missing"]["text"] and named["package-missing"]["hint"].startswith("make install")
    assert {"python", "disk", "access"} <= {finding["topic"] for finding in told["findings"]}


# --- parts that need no whole run


@pytest.mark.parametrize(
    ("cuda", "card", "name"),
    [
        (None, {"driver": "580.95.05"}, "torch-without-cuda"),
        ("13.0", {"driver": "535.104.05"}, "driver-too-old"),
        ("12.8", {"driver": "535.104.05"}, "ok"),
        ("13.0", {"driver": "580.95.05"}, "ok"),
        ("13.0", {"fails": True}, "driver-broken"),
        (None, {"fails": True}, "driver-broken"),
    ],
)
def test_torchs_build_is_held_against_the_driver(tmp_path, monkeypatch, cuda, card, name):
    package = tmp_path / "site" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "version.py").write_text(f"cuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n")
    monkeypatch.setenv("PATH", f"{nvidia_smi(tmp_path / 'bin', **card)}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (found,) = doctor_packages.torch_build()
    assert found.name == name and (found.hint or found.name == "ok")
    if name == "torch-without-cuda":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        (meant,) = doctor_packages.torch_build()
        assert meant.name == "ok" and "hidden" in meant.text


class Hub(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield Hub
    server.shutdown()
    server.server_close()


def model_finding(name: str) -> str:
    config = Config.model_validate({"model": {"name": name}})
    return doctor_hub.model(config.model, doctor_hub.Look()).name


def test_a_hub_that_answers_is_no_fault_and_one_that_is_down_is_one_only_without_the_model(
    hub, tmp_path, tiny_model, monkeypatch
):
    monkeypatch.setenv("SFT_MODEL_CACHE", str(tmp_path / "models"))
    assert [model_finding("some/model"), model_finding(str(tiny_model))] == ["ok", "ok"]
    monkeypatch.setattr(hub, "status", 503)
    assert [model_finding("some/model"), model_finding(str(tiny_model))] == ["model-missing", "ok"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert [model_finding("some/model"), model_finding(str(tiny_model))] == ["model-missing", "ok"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert [model_finding("some/model"), model_finding(str(tiny_model))] == ["model-missing", "ok"]
    assert [model_finding("no such"), model_finding(str(tmp_path)), model_finding("embedded/other")] == [
        "model-unusable"
    ] * 3


def test_a_hub_that_never_answers_is_given_up_within_seconds(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(doctor_hub, "SECONDS", 0.5)
        assert doctor_hub.Look().wait()


def test_a_token_is_never_shown_and_its_faults_are(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_hub, "REPO_ROOT", tmp_path)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    secret = "hf_" + "Ab1" * 11
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert "none" in doctor_hub.token().text
    (tmp_path / ".env").write_text(f"HF_TOKEN={secret}\n")
    (tmp_path / ".env").chmod(0o600)
    monkeypatch.setenv("HF_TOKEN", secret)
    good = doctor_hub.token()
    assert (good.state, good.text) == ("ok", "there is one (HF_TOKEN in .env)")
    (tmp_path / ".env").chmod(0o644)
    open_to_all = doctor_hub.token()
    assert open_to_all.name == "secrets-readable" and open_to_all.hint == f"chmod 600 '{tmp_path / '.env'}'"
    (tmp_path / ".env").unlink()
    monkeypatch.setenv("HF_TOKEN", "'my token'")
    odd = doctor_hub.token()
    assert odd.name == "token-odd" and "my token" not in odd.text + odd.hint


def test_writing_is_tried_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctor_machine.why_not_writable(Path("outputs")) is None  # not there yet: its parent counts
    assert list(tmp_path.iterdir()) == []
    Path("outputs").touch()
    name, text, hint = doctor_machine.why_not_writable(Path("outputs")) or ("", "", "")
    assert name == "not-a-folder" and str(tmp_path / "outputs") in text and hint.startswith("move it away: mv")


def test_rendered_rows_are_asked_for_the_splits_that_the_config_needs(folder, monkeypatch):
    from scripts.utils import stages

    monkeypatch.chdir(folder)
    where = stages.folder("render", "rows")
    where.mkdir(parents=True)

    def named(*counts: int, **settings: dict[str, object]) -> list[str]:
        rows = dict(zip(stages.SPLITS, counts, strict=True))
        for split, count in rows.items():
            (where / f"{split}.jsonl").write_text("{}\n" * count)
        stages.write_manifest(where, "render", {}, {}, splits=rows)
        config = Config.model_validate({"data": {"raw": "data/raw/rows.jsonl"}, **settings})
        return [f"{finding.state} {finding.name}" for finding in doctor_data.rendered(config)]

    assert named(5, 1, 1) == ["ok ok"]
    assert named(5, 1, 0) == ["warning split-missing"]
    assert named(0, 1, 1) == ["error split-missing"]
    assert named(5, 0, 1) == ["ok ok"]
    assert named(5, 0, 1, train={"early_stopping_patience": 2}) == ["error split-missing"]
    (where / "test.jsonl").unlink()
    config = Config.model_validate({"data": {"raw": "data/raw/rows.jsonl"}})
    (gone,) = doctor_data.rendered(config)
    assert gone.name == "split-missing" and "test.jsonl is missing" in gone.text and "make render FORCE=1" in gone.hint
    (where / "manifest.json").write_text("{")
    (damaged,) = doctor_data.rendered(config)
    assert (damaged.name, damaged.code) == ("rows-damaged", 2)


def judged(seen: Looked, **render: object) -> dict[str, str]:
    config = Config.model_validate({"render": render})
    return {finding.name: finding.state for finding in doctor_data.judge(seen, config)}


def test_lengths_and_masks_are_judged_by_what_the_config_does_with_them():
    seen = Looked(lengths=[10, 20, 600], trained=100, files=1)
    assert judged(seen) == {"ok": "ok"}
    assert judged(seen, max_length=512) == {"rows-too-long": "warning"}
    assert judged(seen, max_length=512, too_long="error") == {"rows-too-long": "error"}
    assert judged(seen, max_length=8) == {"rows-too-long": "error"}
    assert judged(seen, max_length=8, too_long="truncate_start") == {"rows-too-long": "warning"}
    assert judged(Looked(lengths=[10], without_end=["a:1"], files=1)) == {"ok": "ok", "end-untrained": "warning"}
    assert judged(Looked(lengths=[10], whole=["a:1"], files=1)) == {"ok": "ok", "mask-full": "warning"}
    rejected = Looked(lengths=[10] * 99, unusable={'"answer" is empty': ("a:1", 1)}, files=1)
    assert judged(rejected)["rows-unusable"] == "warning"
    rejected.unusable = {'"answer" is empty': ("a:1", 20)}
    assert judged(rejected)["rows-unusable"] == "error"


def test_an_answer_without_a_trained_end_token_is_seen(tmp_path):
    from scripts.utils import chat
    from tests.tiny_models import smollm2_tokenizer

    tokenizer = smollm2_tokenizer()
    row = {
        "id": "0",
        "messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}],
        "source": {},
    }

    def ends(template: str) -> Looked:
        seen = Looked()
        path = tmp_path / "own.jinja"
        path.write_text(template)
        chosen = chat.choose_template(tokenizer, str(path))
        doctor_data._add(seen, row, "rows:1", tokenizer, chosen, RenderSection())
        return seen

    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    assert ends(bare).without_end == ["rows:1"]
    ended = bare.replace("{{ m.content }}", "{{ m.content }}{{ eos_token }}")
    seen = ends(ended)
    assert (seen.without_end, seen.problems) == ([], {})


def test_a_trial_says_what_it_came_to_before_it_ended(monkeypatch):
    ended = trial.finish(trial.start("scripts.utils.trial_child", "no such trial", question={"config": None}), 60)
    assert ended.reason == "" and ended.said == []
    ended = trial.finish(trial.start("scripts.utils.trial_child", "rows", question={"config": None}), 60)
    assert "ended with code 1 while starting" in ended.reason and "AssertionError" in ended.reason


def published_names() -> set[str]:
    """Names that the doctor's files give to findings: the second argument of each, and what reaches it by a variable."""
    paths = [
        *(ROOT / "scripts" / "utils").glob("doctor_*.py"),
        ROOT / "scripts/utils/trial_child.py",
        ROOT / "scripts/check.py",
    ]
    calls = [node for path in paths for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    given = [
        c.args[1]
        for c in calls
        if getattr(c.func, "id", "") in ("fault", "warning", "from_problem") and len(c.args) > 1
    ]
    return {a.value for a in given if isinstance(a, ast.Constant)} | {
        "not-a-folder",
        "read-only",
        "mask-empty",
        "template-broken",
    }


def test_the_docs_list_every_name_and_no_other():
    table = re.findall(r"^\| (`[a-z-]+`(?: `[a-z-]+`)*) \|", (ROOT / "docs" / "check.md").read_text(), flags=re.M)
    assert {name for cell in table for name in re.findall(r"`([a-z-]+)`", cell)} == published_names()


@pytest.mark.slow
def test_make_hands_json_over(folder):
    done = run(["make", "-s", "-C", ROOT, "check", "JSON=1", f"CONFIG={folder / 'none.yaml'}"], folder)
    told = json.loads(done.stdout)
    jsonschema.validate(told, SCHEMA)
    assert told["exit_code"] == 2 and "config-wrong" in {finding["name"] for finding in told["findings"]}
    assert "sft-check: exit code 2" in done.stderr
