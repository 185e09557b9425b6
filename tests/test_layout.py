"""The house's own rules: floors of scripts/utils, one header in each script, no borrowed names, light starts."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.commands import ROOT, environment, script

SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.py") if path.name != "__init__.py")
PARTS = {path.stem: path for path in (ROOT / "scripts" / "utils").glob("*.py") if path.name != "__init__.py"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# each imports only from the lines above its own; a new file must be given a floor
FLOORS = """
stop_signals errors schema console environment template_child scoring overlap intervals
lifetime growing autocast
workers ranks findings
files yaml_text sweep_schema gguf_file unpacked turns template_guard literals lengths spans servers sampling json_schema chat_input
hardware launching sharding event_log safetensors_writer gguf_model gguf_runtime training_state json_rows splits continued near suspicious report_page unfinished scrubbing trial doctor_machine
arrow_rows unsloth_probe bundle doctor_packages zero
config sweep_file architecture raw_files prompts stages stamp checkpoints model_folder chat backend_choice
command records model_hub embedded_model encoding chunked_loss lean_lora metrics resume memory
packing planning offload fused_kernels sweep_choices hparams trainer_settings
leaderboard_runs
attention sweep_plan trackers
loss backends answer_cache sweep_state sweep_prune
data_hub reading hub_push sweep_places train_words
model_store schedule sweep_jobs loss_choice
model_card forecast doctor_hub doctor_config
adapters sweep_table tally sources unsloth_child shown grouping row_losses doctor_trials
saving data_report run_report_curves run_report_facts run_report_style run_report_words
spool run_report_rows run_report_scores leaderboard_ranking
leaderboard_table
leaderboard_plots
run_report_warnings run_report_cards
run_report_page leaderboard_page
rendered training trained generation initial run_report
rendering token_store streaming served answering
callbacks merging merge_proof evaluation speaking engine_child self_test held_out gguf_tokenizer exporting go_template doctor_data
comparison side_by_side harness_tasks harness_model conversation merge_layers gguf_export modelfile trial_child
chat_session gguf_proof
"""

HEADER = """if not __package__:  # run as a file: import from the repository root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])
"""


def imported_parts(path: Path) -> set[str]:
    """Names of the scripts.utils modules that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "scripts.utils":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scripts.utils."):
            found.add((node.module or "").split(".")[2])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[2] for alias in node.names if alias.name.startswith("scripts.utils.")}
    return found


def test_every_part_imports_only_from_the_floors_above_it():
    floor = {name: number for number, line in enumerate(FLOORS.strip().splitlines()) for name in line.split()}
    assert sorted(PARTS) == sorted(floor), "give each file in scripts/utils a floor"
    wrong = [
        f"{name} (floor {floor[name]}) imports {other} (floor {floor[other]})"
        for name, path in PARTS.items()
        for other in imported_parts(path)
        if floor[other] >= floor[name]
    ]
    assert wrong == []


def test_scripts_never_import_one_another():
    names = {path.stem for path in SCRIPTS}
    for path in [*SCRIPTS, *PARTS.values()]:
        text = path.read_text()
        for found in re.findall(r"^\s*(?:from|import) scripts(?: import |\.)(\w+)", text, flags=re.M):
            assert found == "utils" or found not in names, f"{path.name} imports scripts.{found}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_each_script_has_the_same_header(path):
    assert HEADER in path.read_text()


def test_no_script_bears_the_name_of_a_library():
    libraries = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    assert [path.stem for path in SCRIPTS if path.stem in libraries] == []


def test_every_entry_point_is_a_script_with_a_main():
    for name, target in PROJECT["project"]["scripts"].items():
        module, function = target.split(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        assert name == f"sft-{path.stem.replace('_', '-')}"
        assert f"def {function}(" in path.read_text(), target
    assert {path.stem for path in SCRIPTS} == {
        t.split(":")[0].split(".")[1] for t in PROJECT["project"]["scripts"].values()
    }


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_needs_no_heavy_library(path):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{path.name!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(path)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'tensorboard'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("how", ["file", "module", "elsewhere"])
def test_a_script_runs_as_file_as_module_and_from_any_folder(tmp_path, how):
    if how == "module":
        words, cwd = ["-m", "scripts.process"], ROOT
    else:
        words, cwd = [str(ROOT / "scripts" / "process.py")], ROOT if how == "file" else tmp_path
    done = subprocess.run(
        [sys.executable, *words, "--help"], cwd=cwd, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: sft-process")


def test_no_file_names_a_package_index_or_this_machine():
    # an index has its packages under simple/ or whl/
    pattern = re.compile(rf"https?://\S*/(simple|whl|packages)\b|{re.escape(str(ROOT))}/")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix != ".jsonl":
            assert not pattern.search(path.read_text(errors="replace")), name


def test_every_direct_dependency_is_pinned():
    pinned = {
        re.split(r"[=; ]", line)[0].lower()
        for line in (ROOT / "env" / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    wanted = [*PROJECT["project"]["dependencies"]]
    for extra in PROJECT["project"]["optional-dependencies"].values():
        wanted += extra
    names = [re.split(r"[^A-Za-z0-9._-]", text)[0].lower().replace("_", "-") for text in wanted]
    assert [name for name in names if name not in pinned] == []
    # versions only: no addresses, no options of an installer
    assert not re.search(r"https?:|@|^-", (ROOT / "env" / "constraints.txt").read_text(), flags=re.M)


def test_a_script_says_its_exit_code_last(tmp_path):
    done = script("process", "--config", "none.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "sft-process: exit code 2"
