"""Once the model is there, nothing looks for another machine: every step runs with the network watched and cut off.

Watched twice: inside each Python process (tests/no_network/sitecustomize.py), and from outside by the kernel, where it lets
an ordinary user have a network of his own: there the only way out is an interface that leads nowhere, and the kernel counts
what is sent to it, also by parts that are not Python (wandb's, which is written in Go).
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from scripts.utils import environment as variables
from scripts.utils import model_folder
from tests.commands import ROOT, environment
from tests.test_train import RUN

OFF = "HF_HUB_OFFLINE TRANSFORMERS_OFFLINE HF_DATASETS_OFFLINE WANDB_MODE".split()
# the name server may be one of this machine: a look-up has to leave it to be seen
NAMESPACE = """
set -e
ip link set lo up
ip tuntap add sink mode tun
ip address add 192.0.2.2/24 dev sink
echo 1 >/proc/sys/net/ipv6/conf/sink/disable_ipv6
ip link set sink up
ip route add default dev sink
printf 'nameserver 192.0.2.1\noptions timeout:1 attempts:1\n' >"$SFT_NETWORK_LOG.resolv"
mount --bind "$SFT_NETWORK_LOG.resolv" "$(readlink -f /etc/resolv.conf)"
set +e
"$@"
code=$?
cat /proc/self/net/dev >"$SFT_NETWORK_LOG.dev"
exit $code
"""


def run_watched(words: list[str], log: Path, *, cut_off: bool, **extra: str) -> subprocess.CompletedProcess[str]:
    for name in ("", ".dev", ".resolv"):
        Path(f"{log}{name}").unlink(missing_ok=True)
    outside = (
        ["unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-c", NAMESPACE, "sh"] if cut_off else []
    )
    given = {name: value for name, value in environment(**extra).items() if name not in OFF}
    paths = os.pathsep.join([str(ROOT / "tests" / "no_network"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return subprocess.run(
        [*outside, *words],
        env={**given, "SFT_NETWORK_LOG": str(log), "PYTHONPATH": paths},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def reached_out(log: Path) -> list[str]:
    """What the processes tried, one line each, and how many packets the kernel saw leaving."""
    found = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    counts = Path(f"{log}.dev")
    if counts.exists():
        fields = re.search(r"sink:((?:\s+\d+)+)", counts.read_text())
        assert fields
        numbers = [int(text) for text in fields[1].split()]
        if packets := numbers[9] + numbers[11]:  # sent, and dropped for want of a reader
            found.append(f"{packets} packets left the machine")
    return found


LOOKS_UP = "import socket\ntry: socket.getaddrinfo('example.com', 443)\nexcept OSError: pass\n"
SENDS = "import ctypes, socket, sys\ns = socket.socket(type=socket.SOCK_DGRAM)\ntry: s.connect(('192.0.2.9', 9)); s.send(b'x')\nexcept OSError: pass\n"


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether this machine lets a test have a network of its own that counts; tried by sending something in one."""
    if not all(shutil.which(name) for name in ("unshare", "ip", "mount")):
        return False
    log = tmp_path_factory.mktemp("network") / "log"
    done = run_watched([sys.executable, "-I", "-c", SENDS], log, cut_off=True)  # -I: without the watch inside
    return done.returncode == 0 and any("packets" in line for line in reached_out(log))


@pytest.mark.parametrize("code", [LOOKS_UP, SENDS], ids=["a name is looked up", "something is sent"])
def test_the_watch_sees_what_reaches_out(code: str, tmp_path: Path) -> None:
    run_watched([sys.executable, "-c", code], tmp_path / "log", cut_off=False)
    assert len(reached_out(tmp_path / "log")) == 1


def test_the_watch_lets_a_process_speak_to_its_own_machine(tmp_path: Path) -> None:
    code = (
        "import socket\nserver = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(('localhost', server.getsockname()[1])).send(b'x')\n"
    )
    done = run_watched([sys.executable, "-c", code], tmp_path / "log", cut_off=False)
    assert done.returncode == 0, done.stderr
    assert reached_out(tmp_path / "log") == []


def test_a_look_up_by_a_part_that_is_not_python_is_seen_from_outside(tmp_path: Path, cut_off: bool) -> None:
    if not cut_off:
        pytest.skip("this machine lets no user have a network of his own")
    getent = shutil.which("getent")
    if not getent:
        pytest.skip("there is no getent")
    run_watched([getent, "hosts", "example.com"], tmp_path / "log", cut_off=True)
    assert any("packets" in line for line in reached_out(tmp_path / "log"))


@pytest.mark.slow
def test_no_step_looks_for_another_machine_once_the_model_is_there(
    project: Callable[..., Path], tiny_model: Path, cut_off: bool
) -> None:
    folder = project(max_steps=2, self_test=True)
    config = json.loads(Path("tiny.yaml").read_text())
    # a name of the hub, whose model was fetched before; with a token, for there are libraries that ask whose it is
    config["model"]["name"] = "some-lab/tiny-llama"
    trackers = [name for name in ("wandb", "trackio") if find_spec(name)]
    config |= {
        "tracking": {"report_to": trackers or ["tensorboard"]},
        "eval": {"max_new_tokens": 4},
        "infer": {"max_new_tokens": 4},
    }
    Path("tiny.yaml").write_text(json.dumps(config))
    cached = folder / "models" / "some-lab--tiny-llama"
    shutil.copytree(tiny_model, cached)
    model_folder.write_manifest(cached, "some-lab/tiny-llama", None, "c0ffee" + "0" * 34)
    Path("prompts.jsonl").write_text('{"prompt": "How much is 2 plus 3?"}\n')
    given = {"SFT_MODEL_CACHE": str(folder / "models"), "HF_HOME": str(folder / "hf"), "HF_TOKEN": "hf_" + "a" * 34}
    steps = ["process", "style", "render", "plan", "train", "eval", "report", "leaderboard", "infer", "merge"]
    more = {
        "style": ["--style", "be brief"],
        "infer": ["--input", "prompts.jsonl", "--output", "answers.jsonl"],
        "leaderboard": ["--by", "loss"],
    }
    for step in steps:
        settings = [] if step == "leaderboard" else ["--config", "tiny.yaml", "--set", "style.text='be brief'"]
        words = [sys.executable, str(ROOT / "scripts" / f"{step}.py"), *settings, *more.get(step, [])]
        done = run_watched(words, folder / "network", cut_off=cut_off, **given)
        assert done.returncode == 0, f"{step}: {done.stderr}"
        assert reached_out(folder / "network") == [], step
    assert Path("outputs", RUN, "merged", "config.json").is_file() and Path("answers.jsonl").is_file()
    for name in trackers:
        place = {"wandb": f"{RUN}/wandb/offline-run-*/*.wandb", "trackio": ".trackio/*.db"}[name]
        assert list(Path("outputs").glob(place)), name


def test_telemetry_is_off_unless_the_user_switches_it_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(variables, "_HEAVY", ())
    switches = "HF_HUB_DISABLE_TELEMETRY DO_NOT_TRACK DISABLE_TELEMETRY HF_UPDATE_DOWNLOAD_COUNTS WANDB_ERROR_REPORTING GRADIO_ANALYTICS_ENABLED OTEL_SDK_DISABLED VLLM_NO_USAGE_STATS UNSLOTH_DISABLE_STATISTICS".split()
    for name in switches:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    variables.prepare(tmp_path)
    said = {name: os.environ[name] for name in switches}
    assert said.pop("VLLM_NO_USAGE_STATS") == "0"
    on = {
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "WANDB_ERROR_REPORTING": "false",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "OTEL_SDK_DISABLED": "true",
    }
    assert said == {name: on.get(name, "1") for name in said}


@pytest.mark.parametrize("library", ["wandb", "gradio_client", "opentelemetry", "unsloth", "datasets", "vllm"])
def test_each_library_still_reads_the_switch_that_is_set_for_it(library: str) -> None:
    """A switch that a new version no longer reads would be a placebo."""
    found = find_spec(library)
    if not found or not found.submodule_search_locations:
        pytest.skip(f"{library} is not installed")
    switch = {
        "wandb": "WANDB_ERROR_REPORTING",
        "gradio_client": "GRADIO_ANALYTICS_ENABLED",
        "opentelemetry": "OTEL_SDK_DISABLED",
        "unsloth": "UNSLOTH_DISABLE_STATISTICS",
        "datasets": "HF_UPDATE_DOWNLOAD_COUNTS",
        "vllm": "VLLM_NO_USAGE_STATS",
    }[library]
    assert switch in variables._DEFAULTS
    places = [path for place in found.submodule_search_locations for path in Path(place).rglob("*.py")]
    assert any(switch.encode() in path.read_bytes() for path in places)
