"""Trackers: all are told the same, a resumed run goes on in its record, and no failure of theirs stops a training."""

import json
import os
import sqlite3
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from scripts.utils import event_log, files, hparams, run_report_curves, stamp, trackers
from scripts.utils.trackers import Guarded, Tracker
from tests.commands import script
from tests.test_train import RUN, run_steps

TOLD = (
    "train/loss",
    "train/learning_rate",
    "train/tokens_per_second",
    "eval/loss",
    "eval/perplexity",
    "eval/best_loss",
)


# --- a tracker that fails


def fails(error: BaseException) -> Callable[..., Any]:
    def raise_it(*_: Any) -> Any:
        raise error

    return raise_it


@pytest.mark.parametrize("error", [OSError("no room"), SystemExit(3), KeyboardInterrupt(), ValueError("")])
def test_a_tracker_that_cannot_open_is_one_warning(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Guarded("wandb", fails(error))
    tracker.log({"a": 1.0}, 1)
    tracker.finish()
    err = capsys.readouterr().err
    assert tracker.failed and err.count("warning:") == 1
    assert "wandb records nothing more of this run" in err and type(error).__name__ in err


def test_a_tracker_that_fails_later_is_left_out_from_then_on(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[int] = []

    def log(values: Mapping[str, float], step: int) -> None:
        told.append(step)
        if step == 2:
            raise ConnectionError("the server went away")

    tracker = Guarded("wandb", lambda: Tracker(log, fails(OSError("never asked"))))
    for step in (1, 2, 3):
        tracker.log({"a": 1.0}, step)
    tracker.finish()
    assert told == [1, 2]
    err = capsys.readouterr().err
    assert err.count("warning:") == 1 and "the server went away" in err


@pytest.mark.parametrize("where", ["open", "log", "finish"])
def test_a_tracker_that_hangs_is_waited_for_only_so_long(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    forever = threading.Event()

    def hang(*_: Any) -> Any:
        forever.wait()

    def open_it() -> Tracker:
        if where == "open":
            hang()
        return Tracker(hang if where == "log" else lambda *_: None, hang if where == "finish" else lambda: None)

    tracker = Guarded("wandb", open_it, 0.2 if where == "open" else 60)
    tracker.log({"a": 1.0}, 1, seconds=0.2)
    tracker.finish(seconds=0.2)
    forever.set()
    err = capsys.readouterr().err
    assert tracker.failed and err.count("warning:") == 1 and "did not answer within" in err


def test_a_secret_in_an_error_is_not_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    Guarded("wandb", fails(OSError("key 0123456789abcdef0123456789abcdef01234567 refused")))
    err = capsys.readouterr().err
    assert "0123456789" not in err and "***" in err


def test_names_are_grouped_the_same_for_all() -> None:
    logs = {"loss": 1, "eval_loss": 2.0, "epoch": 0.5, "note": "text"}
    assert trackers.by_group(logs) == {"train/loss": 1.0, "eval/loss": 2.0, "train/epoch": 0.5}


@pytest.mark.parametrize(
    ("asked", "names"),
    [([], []), (["tensorboard"], ["tensorboard"]), (["wandb"], ["tensorboard", "wandb"])],
)
def test_tensorboard_is_always_there_unless_nothing_is_asked_for(asked: list[str], names: list[str]) -> None:
    assert trackers.names_of(asked) == names


# --- TensorBoard


def tensorboard(run: str) -> tuple[dict[str, dict[int, float]], str]:
    """Scalars by name and step over all event files, and the config that they show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    text = ""
    for path in run_report_curves.event_files(Path("outputs") / run):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, {}).update({event.step: event.value for event in events.Scalars(name)})
        text = events.Tensors("config")[0].tensor_proto.string_val[0].decode()
    return found, text


def test_tensorboard_has_what_was_logged_the_config_and_the_hparams(
    project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.test_leaderboard import hparams_page

    monkeypatch.setenv("SOME_TOKEN", "correct-horse-battery")
    project(epochs=2)
    run_steps(overrides="infer.stop=[correct-horse-battery]")
    assert "correct-horse-battery" not in Path("outputs", RUN, "config.yaml").read_text()
    scalars, text = tensorboard(RUN)
    assert set(TOLD) <= set(scalars)
    logged = {
        line["step"]: line["loss"]
        for line in files.read_jsonl(Path("outputs") / RUN / "metrics.jsonl")
        if "loss" in line
    }
    assert scalars["train/loss"] == pytest.approx(logged)
    assert "learning_rate: 0.003" in text and "correct-horse-battery" not in text
    settings, values = hparams_page(Path("outputs"))
    assert settings[RUN]["train.learning_rate"] == pytest.approx(0.003) and settings[RUN]["lora.r"] == 4
    assert values[RUN]["eval/best_loss"] == pytest.approx(min(scalars["eval/loss"].values()))


def test_a_tensorboard_folder_that_cannot_be_written_does_not_stop_the_training(
    project: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    project(max_steps=2)
    Path("outputs", RUN).mkdir(parents=True)
    Path("outputs", RUN, "tensorboard").write_text("a file is in the way")
    run_steps()
    assert stamp.require(RUN)["status"] == "finished"
    err = capsys.readouterr().err
    assert err.count("tensorboard records nothing more of this run") == 1


def test_an_event_file_that_a_kill_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    events = event_log.EventFile(tmp_path / "tensorboard")
    for step in range(1, 6):
        events.scalars({"train/loss": float(step)}, step)
    events.close()
    events.path.write_bytes(events.path.read_bytes()[:-7])
    assert run_report_curves.read(tmp_path).train == [(n, float(n)) for n in range(1, 5)]


# --- wandb and trackio, really run


def wandb_records(folder: Path) -> Iterator[Any]:
    """The records of an offline run's .wandb file: a log of LevelDB's format (blocks of 32 KiB) of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = folder.read_bytes(), 7, b""  # the first 7 bytes say that it is one
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little for a header: the rest of a block is empty
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_told(path: Path) -> tuple[dict[str, Any], dict[str, dict[int, float]]]:
    """What a wandb record says: name, id, project and config; and values by name and step."""
    about: dict[str, Any] = {}
    values: dict[str, dict[int, float]] = {}
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            about = {"name": record.run.display_name, "id": record.run.run_id, "project": record.run.project}
            about["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            about["host"] = record.run.host
        elif kind == "history":
            line = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name, value in line.items():
                values.setdefault(name, {})[int(line["train/global_step"])] = value
    return about, values


def trackio_told(project: str, run: str) -> tuple[list[dict[str, Any]], dict[str, dict[int, float]]]:
    """The configs of a trackio project's runs of that name, and values by name and step."""
    with sqlite3.connect(f"file:outputs/.trackio/{project}.db?mode=ro", uri=True) as database:
        database.row_factory = sqlite3.Row
        configs = [
            json.loads(row["config"]) for row in database.execute("SELECT * FROM configs WHERE run_name = ?", [run])
        ]
        rows = list(database.execute("SELECT step, metrics FROM metrics WHERE run_name = ?", [run]))
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in json.loads(row["metrics"]).items():
            values.setdefault(name, {})[row["step"]] = value
    return configs, values


def step(name: str, *words: str, **extra: str) -> str:
    done = script(name, "--config", "tiny.yaml", *words, cwd=Path.cwd(), **extra)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_wandb_and_trackio_keep_the_same_record_which_resume_and_evaluation_go_on_with(
    project: Callable[..., Path],
) -> None:
    for name in ("wandb", "trackio"):
        if not find_spec(name):
            pytest.skip(f"{name} is not installed (make install EXTRAS={name})")
    secret = "correct-horse-battery"
    project(max_steps=3, scheduler="constant", warmup=0)
    settings = f"tracking.report_to=[wandb,trackio] tracking.project=parcels style.text={secret} eval.max_new_tokens=4"
    for name in ("process", "style", "render", "train"):
        err = step(name, "--set", settings, SOME_TOKEN=secret)
    assert "warning" not in err, err
    step("train", "--set", f"{settings} train.max_steps=6", SOME_TOKEN=secret)  # goes on from step 3
    step("eval", "--set", settings, SOME_TOKEN=secret)

    scalars, _ = tensorboard(RUN)
    assert set(scalars["train/loss"]) == set(range(1, 7)) and set(TOLD) <= set(scalars)
    found = files.read_json(Path("outputs") / RUN / "eval" / "metrics.json")["tuned"]

    records = sorted(Path("outputs", RUN, "wandb").glob("offline-run-*/run-*.wandb"))
    told = [wandb_told(path) for path in records]
    assert len(told) == 3 and len({about["id"] for about, _ in told}) == 1  # one record, in three starts
    merged: dict[str, dict[int, float]] = {}
    for about, values in told:
        assert (about["name"], about["project"]) == (RUN, "parcels")
        assert about["config"]["lora"]["r"] == 4 and not about["host"]
        for name, by_step in values.items():
            merged.setdefault(name, {}).update(by_step)

    configs, tracked = trackio_told("parcels", RUN)
    assert len(configs) == 1 and configs[0]["lora"]["r"] == 4 and not configs[0]["_Username"]
    for values in (merged, tracked):
        for name in TOLD:
            assert values[name] == pytest.approx(scalars[name]), name
        assert values["test/loss"] == {6: pytest.approx(found["loss"])}
        assert values["test/exact_match"] == {6: found["exact_match"]}
    for path in [
        *Path("outputs").rglob("*.wandb"),
        *Path("outputs/.trackio").rglob("*"),
        *Path("outputs", RUN, "tensorboard").iterdir(),
        Path("outputs", RUN, "config.yaml"),
    ]:
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path


FAILURES = {
    "closed port": (
        "wandb",
        {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"},
    ),
    "bad key": ("wandb", {"WANDB_MODE": "online", "WANDB_API_KEY": "nonsense"}),
    "no folder": ("wandb", {}),  # a file is in the way
    "no place": ("trackio", {"TRACKIO_DIR": "/dev/null/trackio"}),
    "no server": ("trackio", {"TRACKIO_SERVER_URL": "http://127.0.0.1:9", "TRACKIO_WRITE_TOKEN": "abcdefgh"}),
}


@pytest.mark.slow
def test_a_tracker_that_cannot_record_does_not_stop_the_training(project: Callable[..., Path]) -> None:
    project(max_steps=2)
    for each in ("process", "style", "render"):
        step(each)
    Path("outputs/no-folder").mkdir(parents=True)
    Path("outputs/no-folder/wandb").write_text("a file is in the way")
    for what, (name, extra) in FAILURES.items():
        if not find_spec(name):
            pytest.skip(f"{name} is not installed (make install EXTRAS={name})")
        run = what.replace(" ", "-")
        # ends well, within the time that script() gives
        err = step("train", "--run", run, "--set", f"tracking.report_to=[{name}]", **extra)
        assert stamp.require(run)["status"] == "finished"
        assert "Traceback" not in err, what
        if what != "no server":  # trackio itself keeps what it cannot send
            assert err.count("records nothing more of this run") == 1, err
        assert run_report_curves.read(Path("outputs") / run).train  # the other trackers are as they were


def test_without_a_key_wandb_records_offline_and_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not find_spec("wandb"):
        pytest.skip("wandb is not installed (make install EXTRAS=wandb)")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not trackers._has_wandb_key()
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'0' * 40}\n")
    (tmp_path / "netrc").chmod(0o600)
    assert trackers._has_wandb_key()


def test_a_secret_in_the_config_leaves_yaml_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "correct-horse-battery")
    given = {"style": {"text": "correct-horse-battery"}, "infer": {"stop": ["a", "correct-horse-battery"]}}
    hparams.write_config(tmp_path, given)
    assert hparams.read_config(tmp_path) == {"style": {"text": "***"}, "infer": {"stop": ["a", "***"]}}
