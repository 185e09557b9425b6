"""push: exactly the allowed files, private, with a card from the stamp; every refusal one message; the token stays unseen."""

import base64
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from scripts import push
from scripts.utils import files, hub_push, model_card, stamp
from scripts.utils.errors import RefusedError
from scripts.utils.files import REPO_ROOT
from tests.test_model_store import environment
from tests.tiny_models import RUN, enter_run

TOKEN = "hf_" + "a" * 30


class Hub(BaseHTTPRequestHandler):
    """The addresses of the hub's interface that a push uses; what it is given is kept."""

    private: ClassVar[bool] = True
    status: ClassVar[int] = 200  # what every question is answered with, if not this
    made: ClassVar[list[dict[str, Any]]] = []
    stored: ClassVar[dict[str, bytes]] = {}
    uploads: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            return self.answer({"name": "ada", "type": "user"})
        return self.answer({"id": "ada/x", "sha": "0" * 40, "private": self.private, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            return self.answer({"url": f"http://{self.headers['Host']}/ada/x", "name": "ada/x"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            modes = ["lfs" if f["path"].endswith((".safetensors", ".gguf")) else "regular" for f in asked]
            return self.answer(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
                        for f, mode in zip(asked, modes, strict=True)
                    ]
                }
            )
        if self.path.endswith("/info/lfs/objects/batch"):
            where = f"http://{self.headers['Host']}/upload/"
            objects = [
                {**entry, "actions": {"upload": {"href": where + entry["oid"]}}}
                for entry in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        assert "/commit/" in self.path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.stored[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.stored[value["path"]] = self.uploads[value["oid"]]
        return self.answer({"commitUrl": f"http://{self.headers['Host']}/ada/x/commit/1", "commitOid": "1" * 40})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
        self.uploads[self.path.rpartition("/")[2]] = body
        self.answer({})

    def answer(self, value: Any) -> None:
        body = json.dumps(value if self.status == 200 else {"error": "no"}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Hub, "private", True)
    monkeypatch.setattr(Hub, "status", 200)
    for kept in (Hub.made, Hub.stored, Hub.uploads):
        kept.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter_run(tmp_path, monkeypatch)


def pushed(folder: Path, *words: str, **more: str) -> tuple[int, str]:
    command = [sys.executable, str(REPO_ROOT / "scripts/push.py"), "--config", "c.yaml", *words]
    # the hub's newer way of storing (xet) has a protocol of its own, which this stand-in does not speak
    variables = environment(folder / "models", HF_HUB_DISABLE_XET="1", **more)
    done = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_a_push_sends_the_adapter_with_its_card_and_nothing_else(run: Path, hub: str) -> None:
    folder = run / "adapters" / RUN
    for name in ("train.jsonl", "notes.txt", ".env", "trainer_state.json", "backend.json", "adapter_model.log"):
        (folder / name).write_text("private")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, shown = pushed(run, "--repo", "ada/x", HF_ENDPOINT=hub, HF_TOKEN=TOKEN)
    assert code == 0, shown
    assert [made["visibility"] for made in Hub.made] == ["private"]
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(Hub.stored)
    assert set(Hub.stored) <= {"README.md"} | {n for n in before if hub_push.ALLOWED["adapter"].fullmatch(n)}
    assert not any(data == b"private" for data in Hub.stored.values())
    assert Hub.stored["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    assert (
        b"base_model" in Hub.stored["README.md"]
        and stamp.require(RUN)["data"]["hash"][:16].encode() in Hub.stored["README.md"]
    )
    assert TOKEN not in shown and "private" in shown
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_dry_run_shows_every_file_with_its_size_and_sends_nothing(
    run: Path, hub: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push.main(["--config", "c.yaml", "--repo", "ada/x", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "adapter_model.safetensors" in shown and "KiB" in shown and "nothing was sent" in shown
    assert "sft-adapter.json" not in shown and ".jsonl" not in shown
    assert "base_model:" in shown, "the card is shown too"
    code, _ = pushed(run, "--repo", "ada/x", HF_ENDPOINT=hub, SFT_DRY_RUN="1")
    assert code == 0 and not Hub.made and not Hub.stored


def test_a_public_repository_is_not_filled_unasked(run: Path, hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "private", False)
    code, shown = pushed(run, "--repo", "ada/x", HF_ENDPOINT=hub, HF_TOKEN=TOKEN)
    assert code == 3 and "exists and is public" in shown and not Hub.stored
    code, shown = pushed(run, "--repo", "ada/x", "--public", HF_ENDPOINT=hub, HF_TOKEN=TOKEN)
    assert code == 0 and Hub.stored and "everybody" in shown
    assert Hub.made[-1]["visibility"] == "public"


@pytest.mark.parametrize(
    ("status", "code", "text"), [(401, 2, "token"), (403, 2, "right to write"), (500, 4, "answered 500")]
)
def test_each_answer_of_the_hub_is_told_with_its_code(
    status: int, code: int, text: str, run: Path, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "status", status)
    got, shown = pushed(run, "--repo", "ada/x", HF_ENDPOINT=hub, HF_TOKEN=TOKEN)
    assert got == code and text in shown and "Traceback" not in shown and TOKEN not in shown


def test_what_is_wrong_before_the_network_is_told_with_its_code(run: Path) -> None:
    for code, text, words, more in (
        (4, "no network to the hub", ["--repo", "ada/x"], {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": TOKEN}),
        (4, "HF_HUB_OFFLINE", ["--repo", "ada/x"], {"HF_HUB_OFFLINE": "1", "HF_TOKEN": TOKEN}),
        (2, "no token", ["--repo", "ada/x"], {}),
        (2, "no repository", [], {}),
        (2, "no name of a repository", ["--repo", "a/b/c"], {}),
        (2, "no name of a repository", ["--repo", "ada/x y"], {}),
        (2, "there is no run", ["--repo", "ada/x", "--run", "nowhere"], {}),
        (2, "cannot be pushed", ["--repo", "ada/x", "--which", "data"], {}),
        (2, "make merge", ["--repo", "ada/x", "--which", "merged"], {}),
    ):
        got, shown = pushed(run, *words, **more)
        assert got == code and text in shown and "Traceback" not in shown and TOKEN not in shown, shown


def test_a_secret_in_a_file_stops_the_push(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "adapters" / RUN / "chat_template.jinja").write_text("{# " + TOKEN + " #}")
    assert push.main(["--config", "c.yaml", "--repo", "ada/x", "--dry-run"]) == 3
    assert "nothing is pushed" in (error := capsys.readouterr().err) and TOKEN not in error


@pytest.mark.parametrize("what", sorted(hub_push.ALLOWED))
def test_no_data_log_or_state_is_on_any_list_of_files(what: str) -> None:
    for name in (
        "train.jsonl", "predictions.jsonl", "samples.jsonl", "metrics.jsonl", "manifest.json", "backend.json", "config.yaml",
        "optimizer.pt", "training_args.bin", "events.out.tfevents.1", ".env", "sft-adapter.json", "sft-merge.json",
        "pytorch_model.bin", "model.safetensors.tmp", "x/tokenizer.json", "tokenizer.json.bak",
    ):  # fmt: skip
        assert not hub_push.ALLOWED[what].fullmatch(name)


# --- the card


def facts(**changes: Any) -> dict[str, Any]:
    known = {
        "model": {"name": "org/base", "revision": None, "path_hash": "b" * 64},
        "tuning": {"mode": "lora", "lora": {"r": 8, "alpha": 16}, "target_modules": ["q_proj"]},
        "precision": {"actual": "bf16"},
        "render": {"template": "the model's own", "max_length": 512},
        "data": {"name": "d", "hash": "d" * 64, "splits": {"train": 1200, "val": 30}},
        "result": {"steps": 40, "best_eval_loss": 0.5},
    }
    return known | changes


def test_the_card_says_what_is_known_and_that_the_rest_is_not() -> None:
    text = model_card.card("try1", facts(), what="adapter")
    for part in ("org/base", "d" * 16, "1,200 train", "0.5000", "Not evaluated yet", "names none", "r 8, alpha 16"):
        assert part in text
    head = text.split("---")[1]
    assert "license" not in head and 'base_model: "org/base"' in head
    found = {
        "settings": {"rows": 60, "split": "test"},
        "base": {"loss": 1.5, "exact_match": 0.0, "json": None},
        "tuned": {"loss": 0.5, "exact_match": 0.9, "json": None},
    }
    text = model_card.card("try1", facts(), what="merged", evaluation=found, where="ada/x")
    assert "| exact match | 0 | 0.9 |" in text and "On 60 test rows" in text and "json" not in text.split("##")[3]
    assert "Fewer than 100 rows" in text and 'from_pretrained("ada/x")' in text


def test_the_licence_is_the_one_that_the_base_names(tmp_path: Path) -> None:
    assert model_card.licence_of(None) is None and model_card.licence_of(tmp_path) is None
    for text, licence in (
        ("---\nlicense: apache-2.0\n---\n# x", "apache-2.0"),
        ("---\ntags: [a]\nlicense: 'llama3.2'\n---\n", "llama3.2"),
        ("# x\n\nMade by y, licence Apache-2.0. Converted", "apache-2.0"),
        ("# x\n\nSee the licence.", None),
    ):
        (tmp_path / "README.md").write_text(text)
        assert model_card.licence_of(tmp_path) == licence


def test_a_users_name_and_secrets_never_enter_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada-lovelace")
    monkeypatch.setenv("MY_API_KEY", "sesame-sesame")
    named = {"name": "/home/ada-lovelace/base", "revision": None, "path_hash": "b" * 64}
    text = model_card.card("x", facts(model=named, style={"text": "key sesame-sesame"}), what="adapter")
    assert "ada-lovelace" not in text and "sesame-sesame" not in text
    with pytest.raises(RefusedError):
        hub_push.check_text("/home/ada-lovelace/x", "a test")


@pytest.mark.slow
def test_the_cards_three_lines_load_the_adapter_offline_in_the_repositorys_root(tmp_path: Path) -> None:
    """On the embedded model, as the quick start leaves it; and on a base in a folder."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from scripts.utils import model_store
    from tests.tiny_models import smollm2_tokenizer

    base = model_store.resolve(model_store.EMBEDDED_NAME).path
    for number, (name, cwd) in enumerate(((model_store.EMBEDDED_NAME, REPO_ROOT), (str(base), tmp_path))):
        folder = tmp_path / "adapters" / f"try{number}"
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        )
        model.save_pretrained(folder)
        smollm2_tokenizer().save_pretrained(folder)
        settings = files.read_json(folder / "adapter_config.json")
        settings["base_model_name_or_path"] = model_card.loadable_base(name, base)
        files.write_json(folder / "adapter_config.json", settings)
        known = facts(model={"name": name, "revision": None, "path_hash": "b" * 64})
        text = model_card.card(folder.name, known, what="adapter", where=str(folder))
        (code,) = [part.split("```")[0] for part in text.split("```python\n")[1:]]
        assert len(code.splitlines()) == 3
        code += "assert any('lora_A' in n for n, _ in model.named_parameters()) and tokenizer.chat_template\n"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=cwd,
            env=environment(base.parent, HF_HUB_OFFLINE="1"),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
