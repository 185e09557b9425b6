"""A model name becomes a whole local folder, or one clear error; nothing half, nothing unsafe, no second download."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from safetensors.numpy import save

from scripts.utils import embedded_model, model_folder, model_store
from scripts.utils.errors import MachineError, RefusedError, SFTError, UserError
from scripts.utils.files import REPO_ROOT

COMMIT = "c0ffee" + "0" * 34
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "README.md": b"# tiny",
    "modeling_tiny.py": b"raise SystemExit('code from the hub must never come')",
    "onnx/model.safetensors": b"another format",
}


def weights(seed: int = 0, rows: int = 8) -> bytes:
    import numpy as np

    return save({f"w{seed}": np.random.default_rng(seed).standard_normal((rows, 16)).astype(np.float32)})


SHARDED = {
    "model-00001-of-00002.safetensors": weights(1, 4000),
    "model-00002-of-00002.safetensors": weights(2, 4000),
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"w1": "model-00001-of-00002.safetensors", "w2": "model-00002-of-00002.safetensors"}}
    ).encode(),
}
HUB = {
    "org/whole": FILES | SHARDED | {"consolidated.safetensors": weights(3), "pytorch_model.bin": b"\x80pickle"},
    "org/pickle": FILES | {"pytorch_model.bin": b"\x80pickle"},
    "org/missing-shard": {name: data for name, data in (FILES | SHARDED).items() if "00002-of" not in name},
    "org/altered": FILES | {"model.safetensors": weights()},
    "org/adapter": {"adapter_config.json": b"{}", "adapter_model.safetensors": weights()},
}


class Hub(BaseHTTPRequestHandler):
    """The four addresses of the hub's interface that a download uses, with the files above."""

    requests: ClassVar[list[str]] = []
    broken: ClassVar[str] = ""  # a file that the hub cannot hand out now

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.requests.append(f"{self.command} /{path}")
        parts = path.removeprefix("api/models/").removeprefix("api/datasets/").removeprefix("datasets/").split("/")
        name = "/".join(parts[:2])
        if name == "org/gated":
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if name not in HUB:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if parts[2:3] == ["revision"] and parts[3] not in ("main", "v1", COMMIT):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if parts[2:3] == ["tree"]:
            return self.answer(200, json.dumps([self.entry(n, d) for n, d in HUB[name].items()]).encode())
        if parts[2:3] == ["resolve"]:
            file = "/".join(parts[4:])
            data = HUB[name][file]
            if file == self.broken and self.command == "GET":
                return self.answer(403, b"")
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            if name == "org/altered" and self.command == "GET":
                data = data[:-1] + bytes([data[-1] ^ 1])
            return self.answer(200, data, headers)
        siblings = [{"rfilename": n, **self.entry(n, d)} for n, d in HUB[name].items()]
        return self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())

    def entry(self, name: str, data: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": name, "oid": blob, "blobId": blob, "size": len(data)}
        if name.endswith((".safetensors", ".bin")):
            sha = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": sha, "sha256": sha, "size": len(data), "pointerSize": 130}
        return entry

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.requests.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def environment(cache: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "SFT_", "TRANSFORMERS_"))}
    no_proxy = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return kept | no_proxy | {"SFT_MODEL_CACHE": str(cache), "HF_HOME": str(cache.parent / "hf")} | more


def start(cache: Path, *arguments: str, **more: str) -> "subprocess.Popen[str]":
    """scripts/download_model.py in a process of its own, as make runs it."""
    config = cache.parent / "config.yaml"
    config.write_text("model: {}\n")
    command = [sys.executable, str(REPO_ROOT / "scripts/download_model.py"), "--config", str(config), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment(cache, **more), cwd=cache.parent, stdout=pipe, stderr=pipe, text=True
    )


def download(cache: Path, *arguments: str, **more: str) -> tuple[int, str, str]:
    process = start(cache, *arguments, **more)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def landed(cache: Path) -> list[str]:
    """Model folders in the cache, half ones included."""
    return sorted(p.name for p in cache.glob("*") if p.name not in (".locks", ".hashes")) if cache.exists() else []


def test_hub_model_lands_whole_and_is_used_offline_afterwards(tmp_path: Path, hub: str) -> None:
    cache = tmp_path / "cache"
    code, out, err = download(cache, "--model", "org/whole", HF_ENDPOINT=hub)
    assert code == 0, err
    assert "org/whole" in out
    folder = cache / "org--whole"
    assert landed(cache) == ["org--whole"]
    wanted = {"config.json", "tokenizer.json", "README.md", *SHARDED}  # no code, no pickle, no second set of weights
    assert {p.name for p in folder.iterdir()} == wanted | {model_folder.MANIFEST}
    assert all((folder / name).read_bytes() == HUB["org/whole"][name] for name in wanted)
    manifest = json.loads((folder / model_folder.MANIFEST).read_text())
    assert (manifest["name"], manifest["revision"], manifest["commit"]) == ("org/whole", None, COMMIT)
    shard = "model-00001-of-00002.safetensors"
    assert manifest["files"][shard] == {
        "size": len(SHARDED[shard]),
        "sha256": hashlib.sha256(SHARDED[shard]).hexdigest(),
    }
    Hub.requests.clear()
    assert download(cache, "--model", "org/whole", HF_ENDPOINT=hub)[0] == 0
    assert Hub.requests == []


def test_damaged_cache_is_fetched_again(tmp_path: Path, hub: str) -> None:
    cache = tmp_path / "cache"
    assert download(cache, "--model", "org/whole", "--revision", "v1", HF_ENDPOINT=hub)[0] == 0
    shard = cache / "org--whole@v1" / "model-00002-of-00002.safetensors"
    shard.write_bytes(b"short")
    code, _, err = download(cache, "--model", "org/whole", "--revision", "v1", HF_ENDPOINT=hub)
    assert (code, shard.read_bytes()) == (0, SHARDED[shard.name])
    assert "damaged" in err


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("org/pickle", 3, "pickles"),
        ("org/missing-shard", 3, "1 of 2 weight files are missing"),
        ("org/altered", 3, "not what the hub says"),
        ("org/adapter", 2, "no config.json"),
        ("org/gated", 4, "HF_TOKEN"),
        ("org/unknown", 4, "no such model"),
        ("org/whole@nope", 4, "no revision 'nope'"),
    ],
)
def test_hub_refusals_have_one_message_and_leave_nothing_usable(
    tmp_path: Path, hub: str, name: str, code: int, words: str
) -> None:
    name, _, revision = name.partition("@")
    got, out, err = download(tmp_path / "cache", "--model", name, "--revision", revision, HF_ENDPOINT=hub)
    assert (got, out) == (code, "")
    assert words in err and "hint:" in err and "Traceback" not in err
    assert landed(tmp_path / "cache") == []


@pytest.mark.slow
def test_unreachable_hub_says_what_to_do_within_15_seconds(tmp_path: Path) -> None:
    silent = ThreadingHTTPServer(("127.0.0.1", 0), Hub, bind_and_activate=True)  # accepts, never answers
    began = time.monotonic()
    try:
        endpoint = f"http://127.0.0.1:{silent.server_port}"
        code, _, err = download(tmp_path / "cache", "--model", "org/whole", HF_ENDPOINT=endpoint)
    finally:
        silent.server_close()
    assert code == 4
    assert time.monotonic() - began < 20  # the start of Python included
    assert "make download-model MODEL=org/whole" in err and "MODEL=embedded/smollm2-135m-instruct" in err
    assert str(tmp_path / "org" / "whole") in err  # the folder that was looked for


def test_interrupted_download_goes_on_where_it_stopped(tmp_path: Path, hub: str) -> None:
    cache, shard = tmp_path / "cache", "model-00002-of-00002.safetensors"
    Hub.broken = shard
    code, _, err = download(cache, "--model", "org/whole", HF_ENDPOINT=hub)
    assert code == 4 and "the same command goes on" in err, err
    assert not (cache / "org--whole").exists()
    Hub.broken = ""
    Hub.requests.clear()
    assert download(cache, "--model", "org/whole", HF_ENDPOINT=hub)[0] == 0
    assert [line for line in Hub.requests if line.startswith("GET") and "safetensors" in line] == [
        f"GET /org/whole/resolve/{COMMIT}/{shard}"
    ]
    assert landed(cache) == ["org--whole"]


def test_offline_variable_fails_at_once_without_a_request(tmp_path: Path, hub: str) -> None:
    code, _, err = download(tmp_path / "cache", "--model", "org/whole", HF_ENDPOINT=hub, HF_HUB_OFFLINE="1")
    assert (code, Hub.requests) == (4, [])
    assert "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set" in err


def test_tokenizer_only_takes_no_weights_and_the_full_model_keeps_its_commit(tmp_path: Path, hub: str) -> None:
    code = "import sys; from scripts.utils import model_store as s; print(s.resolve('org/whole', tokenizer_only=True).path)"
    env = environment(tmp_path / "cache", HF_ENDPOINT=hub)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO_ROOT, env=env, capture_output=True, text=True, check=True
    )
    folder = Path(done.stdout.strip())
    assert not list(folder.glob("*.safetensors")) and (folder / "tokenizer.json").is_file()
    Hub.requests.clear()
    assert download(tmp_path / "cache", "--model", "org/whole", HF_ENDPOINT=hub)[0] == 0
    assert Hub.requests[0] == f"GET /api/models/org/whole/revision/{COMMIT}"


def test_the_commit_that_a_stamp_names_is_found_in_the_folder_of_its_branch(tmp_path: Path, hub: str) -> None:
    """train fetches a name or a branch and stamps the commit; eval and merge ask for that commit, maybe offline."""
    cache = tmp_path / "cache"
    assert download(cache, "--model", "org/whole", HF_ENDPOINT=hub)[0] == 0
    Hub.requests.clear()
    code = (
        "import sys; from scripts.utils import model_store as s; "
        f"print(s.resolve('org/whole', '{COMMIT}').path.name, s.present('org/whole', '{COMMIT}').name, "
        "s.present('org/whole', 'f' * 40))"
    )
    env = environment(cache, HF_ENDPOINT=hub)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO_ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["org--whole", "org--whole", "None"] and Hub.requests == []


def test_model_in_the_ordinary_hub_cache_is_not_downloaded_again(tmp_path: Path) -> None:
    snapshot = tmp_path / "hf/hub/models--org--whole/snapshots" / COMMIT
    make_folder(snapshot)
    refs = tmp_path / "hf/hub/models--org--whole/refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    code, out, _ = download(tmp_path / "cache", "--model", "org/whole", HF_HUB_OFFLINE="1")
    assert code == 0
    assert str(snapshot) in out and COMMIT in out


def make_folder(folder: Path, **changes: bytes | None) -> Path:
    folder.mkdir(parents=True)
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": weights(), **changes}
    for name, data in files.items():
        if data is not None:
            (folder / name).write_bytes(data)
    return folder


def test_local_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "org" / "mine")
    monkeypatch.chdir(tmp_path)
    model = model_store.resolve("org/mine")  # a folder wins over a hub id
    assert model == model_store.Model("org/mine", tmp_path / "org" / "mine", None, "folder")


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"config.json": None}, UserError, "no config.json"),
        ({"config.json": None, "adapter_config.json": b"{}"}, UserError, "is an adapter"),
        ({"tokenizer.json": None}, UserError, "no tokenizer"),
        ({"model.safetensors": None}, UserError, "no weights"),
        ({"model.safetensors": None, "pytorch_model.bin": b"\x80"}, RefusedError, "pickles"),
        ({"model.safetensors": None, **SHARDED, "model-00002-of-00002.safetensors": None}, RefusedError, "1 of 2"),
        ({"model.safetensors": weights()[:-1]}, RefusedError, "its header tells"),
        ({"model.safetensors": b""}, RefusedError, "not a safetensors file"),
        ({"model.safetensors": b"<html>404</html>"}, RefusedError, "not a safetensors file"),
        ({"model.safetensors": LFS_POINTER}, RefusedError, "Git LFS pointer"),
    ],
)
def test_unusable_folder_is_refused_by_its_absolute_path(
    tmp_path: Path, changes: dict[str, bytes | None], error: type[SFTError], words: str
) -> None:
    folder = make_folder(tmp_path / "model", **changes)
    with pytest.raises(error, match=words) as caught:
        model_store.resolve(str(folder))
    assert str(folder) in caught.value.message and caught.value.hint


@pytest.mark.parametrize("name", ["./nope", "a/b/c", "/nope", "~/nope", "embedded/other", "", " ", "Qwen/../x"])
def test_name_that_is_neither_folder_nor_hub_id_is_a_user_error(name: str) -> None:
    with pytest.raises(UserError) as caught:
        model_store.resolve(name)
    assert "embedded/smollm2-135m-instruct" in caught.value.hint


def test_content_hash_follows_content_and_reads_again_only_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_MODEL_CACHE", str(tmp_path / "cache"))
    one, two = make_folder(tmp_path / "one"), make_folder(tmp_path / "two")
    before = model_store.content_hash(one)
    assert before == model_store.content_hash(two)
    assert sorted(p.name for p in one.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    read: list[Path] = []
    honest = model_store.sha256_file
    monkeypatch.setattr(model_store, "sha256_file", lambda path: (read.append(path), honest(path))[1])
    assert model_store.content_hash(one) == before and read == []
    (one / "tokenizer.json").write_bytes(b"[]")
    assert model_store.content_hash(one) != before
    assert [path.name for path in read] == ["tokenizer.json"]


def test_leftovers_of_a_model_whose_name_only_begins_alike_stay(tmp_path: Path) -> None:
    for name in (".org--x.abcd1234.new", ".org--x.y.abcd1234.new", ".org--x.tokenizer.abcd1234.new", "org--x"):
        (tmp_path / name).mkdir()
    model_folder.remove_leftovers(tmp_path / "org--x", r"[a-z0-9_]{8}\.new")
    assert landed(tmp_path) == [".org--x.tokenizer.abcd1234.new", ".org--x.y.abcd1234.new", "org--x"]


def test_package_that_cannot_be_fetched_names_the_way_out(tmp_path: Path) -> None:
    code, _, err = download(
        tmp_path / "cache",
        "--model",
        model_store.EMBEDDED_NAME,
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS="",
        UV_OFFLINE="1",
        UV_NO_CACHE="1",
    )
    assert code == 4 and "make download-model" in err and "Traceback" not in err
    assert landed(tmp_path / "cache") == []


def test_too_small_a_disk_is_said_before_anything_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="MiB needed for a model"):
        model_folder.check_space(tmp_path, 1 << 60, "a model")


@pytest.mark.slow
def test_killed_conversion_leaves_nothing_and_two_at_once_end_with_one_good_folder(tmp_path: Path) -> None:
    cache, name = tmp_path / "cache", model_store.EMBEDDED_NAME
    killed = start(cache, "--model", name)
    while not list(cache.glob(".*.new/download/**/*.gguf")):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (cache / "embedded--smollm2-135m-instruct").exists()
    both = [start(cache, "--model", name) for _ in range(2)]
    answers = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert sum("fetching" in err for _, err in answers) == 1
    assert sum("waiting" in err for _, err in answers) == 1
    assert landed(cache) == ["embedded--smollm2-135m-instruct"]
    shared = model_store.resolve(name)
    made = cache / "embedded--smollm2-135m-instruct"
    assert {p.name for p in made.iterdir()} == {p.name for p in shared.path.iterdir()}
    assert model_store.content_hash(made) == model_store.content_hash(shared.path)
    assert shared.revision == embedded_model.PACKAGE_VERSION
