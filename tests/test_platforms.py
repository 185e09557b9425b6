"""What other systems lack is not used: GNU's own flags, bash 4, make 4; containers are written as their linters want."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.utils import files, hardware, servers, template_guard
from scripts.utils.hardware import Hardware
from tests.commands import ROOT, run

SHELL = sorted([*(ROOT / "env").glob("*.sh"), *(ROOT / "workflows").glob("*.sh"), ROOT / ".ci" / "run"])
# what macOS does not have (bash 3.2, BSD tools), and how it is written
NOT_PORTABLE = {
    "bash 4: mapfile": r"\b(?:mapfile|readarray)\b",
    "bash 4: associative arrays and namerefs": r"\b(?:declare|local|typeset)\s+-[a-zA-Z]*[An]",
    "bash 4: case of letters": r"\$\{\w+(?:\[[^]]*\])?(?:,,?|\^\^?)",
    "bash 4: |& and &>>": r"\|&|&>>",
    "bash 4: coproc": r"^\s*coproc\b",
    "bash 4.2: [[ -v": r"\[\[\s+-v\b",
    "bash 4.2: printf %(…)T": r"%\([^)]*\)T",
    "bash 4.3: wait -n": r"\bwait\s+-n\b",
    "bash 4.4: ${x@Q}": r"\$\{\w+@[A-Za-z]\}",
    "bash 4.3: negative subscripts": r"\$\{\w+\[-\d+\]\}",
    "bash 4: ;;&": r";;?&\s*$",
    "bash 4: ** of globstar": r"\bglobstar\b",
    "bash 4: {fd}>": r"\{\w+\}[<>]",
    "GNU sed": r"\bsed\s+(?:-\w*[ir]\w*\b|--)",
    "GNU grep -P": r"\bgrep\s+-\w*P",
    "readlink -f, realpath": r"\breadlink\s+-f\b|\brealpath\b",
    "GNU date": r"\bdate\s+(?:-d|--date|.*%N)",
    "GNU stat": r"\bstat\s+-c\b",
    "GNU xargs": r"\bxargs\s+(?:-r|--)",
    "GNU find": r"\bfind\b.*-(?:printf|regextype)\b",
    "GNU sort": r"\bsort\s+-\w*V",
    "GNU cp, ls, du, df, mktemp, head, tail, tr, cut": r"\b(?:cp|ls|du|df|mktemp|head|tail|tr|cut|sort|mkdir|rm|mv)\s+--[a-z]",
    "head with all but": r"\bhead\s+-[nc]\s*-",
    "tools that macOS lacks": r"(?:^|[|;&({`]|\b(?:if|then|do|exec)\s)\s*(?:nproc|timeout|tac|seq|shuf|sha256sum|md5sum|setsid|free|numfmt)(?:\s|\)|$)",
    "echo -e": r"\becho\s+-[en]",
}  # fmt: skip
MAKE_4 = {
    "3.82: .ONESHELL, .SHELLFLAGS, .RECIPEPREFIX, undefine, private": r"\.ONESHELL|\.SHELLFLAGS|\.RECIPEPREFIX|^\s*undefine\b|\bprivate\s+\w+\s*[:+?]?=",
    "3.82: define with =": r"^define\s+\S+\s*[:+?]?=",
    "4: != and ::=": r"^[\w-]+\s*(?:!=|:::?=)",
    "4: $(file …), $(guile …)": r"\$[({](?:file|guile)\s",
    "4.3: grouped targets": r"^[^\t#]*&:",
    "4.4: $(let …), $(intcmp …), .WAIT": r"\$[({](?:let|intcmp)\s|\.WAIT\b",
    "4: $(abspath) is older, but --output-sync is not": r"--output-sync",
}


def code_of(path: Path) -> list[tuple[int, str]]:
    """Lines without comments."""
    lines = enumerate(path.read_text().splitlines(), 1)
    return [(number, re.sub(r"(?:^|\s)#.*$", "", line)) for number, line in lines]


def uses(path: Path, rules: dict[str, str]) -> list[str]:
    found = []
    for what, pattern in rules.items():
        found += [
            f"{path.name}:{number}: {what}: {line.strip()}"
            for number, line in code_of(path)
            if re.search(pattern, line)
        ]
    return found


def test_shell_scripts_use_what_bash_3_and_other_systems_tools_have():
    assert [use for path in SHELL for use in uses(path, NOT_PORTABLE)] == []


def test_the_makefile_uses_what_make_3_81_has():
    makefile = ROOT / "Makefile"
    assert uses(makefile, {**MAKE_4, **NOT_PORTABLE}) == []


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("sed -i s/a/b/ x", "GNU sed"), ("x=$(readlink -f y)", "readlink"), ("mapfile -t lines <x", "mapfile"), ("echo ${x,,}", "case"),
        ("date +%s%N", "GNU date"), ("timeout 5 x", "lacks"), ("n=$(nproc)", "lacks"), ("declare -A m", "arrays"), ("a |& b", "|&"), ("head -n -1 x", "all but"),
        ("cp --parents a b", "GNU cp"), ("find . -printf x", "GNU find"), ("echo -e x", "echo"), ('case x in a) ;;&', ";;&"),
    ],
)  # fmt: skip
def test_the_rules_see_what_they_are_made_for(tmp_path, line, what):
    (tmp_path / "x.sh").write_text(f"#!/bin/sh\n{line}\n")
    assert any(what in use for use in uses(tmp_path / "x.sh", NOT_PORTABLE))


@pytest.mark.parametrize(
    "line", [".ONESHELL:", "x != date", "a b &: c", "$(file >x,y)", "define x =", "x ::= y", "undefine x"]
)
def test_the_rules_for_make_see_what_they_are_made_for(tmp_path, line):
    (tmp_path / "Makefile").write_text(f"{line}\n")
    assert uses(tmp_path / "Makefile", MAKE_4)


def test_shell_scripts_parse_in_posix_mode_too():
    for path in SHELL:
        for mode in ([], ["--posix"]):
            done = subprocess.run(["bash", *mode, "-n", str(path)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


def test_no_script_needs_a_module_that_only_some_systems_have_before_it_is_used():
    only_posix = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "msvcrt", "winreg"}
    for path in (ROOT / "scripts").rglob("*.py"):
        top = [line for line in path.read_text().splitlines() if re.match(r"(?:import|from) ", line)]
        assert [line for line in top if line.split()[1] in only_posix] == [], path


# --- the ways of other systems, run here


def test_windows_keeps_an_environments_programs_elsewhere(tmp_path):
    words = ["bash", "-c", f'. "{ROOT / "env" / "environment.sh"}" && sft_bin /x && OS=Windows_NT sft_bin /x']
    assert run(words, tmp_path).stdout.split() == ["/x/bin", "/x/Scripts"]
    shown = run(["make", "-s", "-C", ROOT, "-f", "-", "show", "OS=Windows_NT", "VIRTUAL_ENV=/x"], tmp_path)
    assert shown.returncode != 0  # nothing on its standard input: only that the line below is not fooled
    line = next(
        line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("export SFT_ENV_PYTHON")
    )
    (tmp_path / "Makefile").write_text(f"ACTIVE := /x\n{line}\nshow:\n\t@echo $(SFT_ENV_PYTHON)\n")
    assert run(["make", "-s", "show", "OS=Windows_NT"], tmp_path).stdout.strip() == "/x/Scripts/python.exe"
    assert run(["make", "-s", "show"], tmp_path).stdout.strip() == "/x/bin/python"


def test_a_template_from_outside_is_rendered_and_limited_also_where_pipes_cannot_be_polled(monkeypatch):
    monkeypatch.delattr(template_guard.select, "poll")
    call = {
        "messages": [{"role": "user", "content": "x" * 100_000}],
        "tools": None,
        "generation_prompt": False,
        "special": {},
    }
    text, _ = template_guard.render_outside("{{ messages[0].content }}!", "own", call)
    assert text == "x" * 100_000 + "!"
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(files.RefusedError, match="longer than 1 s"):
        template_guard.render_outside(endless, "own", call, seconds=1)


def test_a_child_is_killed_where_there_are_no_process_groups(monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.delattr(servers.os, "killpg")
    servers.kill_session(child)
    assert child.wait(10) != 0


def test_an_apple_gpu_computes_in_what_its_system_has():
    new = Hardware("mps", "Apple GPU", 16 * 2**30, driver="macOS 14.5")
    old = Hardware("mps", "Apple GPU", 16 * 2**30, driver="macOS 13.6")
    assert hardware.best_precision(new)[0] == "bf16"
    assert hardware.best_precision(old)[0] == "fp32"
    assert "macOS 14" in hardware.supported("bf16", old)[1]
    assert not hardware.supported("fp16", new)[0]


def test_four_bits_on_an_apple_gpu_are_refused_with_the_way_out(tiny_model):
    from scripts.utils import backends, doctor_config
    from scripts.utils.errors import MachineError
    from scripts.utils.schema import Config

    machine = Hardware("mps", "Apple GPU", 16 * 2**30, driver="macOS 14.5")
    with pytest.raises(MachineError, match="4-bit layers") as refused:
        backends.load_for_training(Config(), tiny_model, "bitsandbytes", "bf16", machine)
    assert "tuning.mode=lora" in refused.value.hint and "bf16" in refused.value.hint
    found = {finding.name: finding for finding in doctor_config.precision(Config(), machine)}
    assert found["no-four-bits"].code == 4 and "LoRA in bf16" in found["no-four-bits"].hint
    lora = Config.model_validate({"tuning": {"mode": "lora"}})
    assert [finding.state for finding in doctor_config.precision(lora, machine)] == ["ok"]


# --- containers


def test_the_dockerfile_is_clean_under_its_linter():
    linter = Path(sys.prefix) / "bin" / "hadolint"
    if not linter.is_file():
        pytest.skip("hadolint has no wheel for this system")
    done = run([linter, "Dockerfile"], ROOT)
    assert done.returncode == 0, done.stdout


def test_the_image_is_not_roots_and_holds_no_secret():
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    instructions = [line.split()[0] for line in lines if re.match(r"[A-Z]+ ", line)]
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert (
        users
        and users[-1] not in ("root", "0")
        and max(i for i, word in enumerate(instructions) if word == "USER") < instructions.index("COPY")
    )
    assert not re.search(r"(?i)(?:ENV|ARG)\s+\S*(?:token|secret|password|key)", "\n".join(lines))
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".env", ".git", ".venv", ".cache", "outputs", "adapters", "data"} <= set(ignored)
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[2:-1]}
    assert [name for name in copied if name != "." and not (ROOT / name).exists()] == []


def test_the_dev_container_says_what_its_specification_knows():
    told = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    known = {
        "name": str,
        "build": dict,
        "remoteUser": str,
        "updateRemoteUserUID": bool,
        "hostRequirements": dict,
        "postCreateCommand": str,
        "customizations": dict,
    }
    assert {key: type(value) for key, value in told.items()} == known
    assert set(told["build"]) <= {"dockerfile", "context", "target", "args"}
    assert (ROOT / ".devcontainer" / told["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert f"AS {told['build']['target']}" in (ROOT / "Dockerfile").read_text()
    assert told["hostRequirements"]["gpu"] in (True, False, "optional")
    assert f"--uid 1001 {told['remoteUser']}" in (ROOT / "Dockerfile").read_text()
