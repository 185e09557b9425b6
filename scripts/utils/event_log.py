"""TensorBoard's event files: scalars, texts, and the HParams by which its HPARAMS page sorts runs.

Written record by record as TensorBoard's own writer does it, without a thread in between: what was logged is on the
disk, and a full disk is an error here and now. A run's settings stand at the start of each of its event files; its
results are added in a small file of their own once it has ended, since TensorBoard goes on to the newest file of a
folder and would no longer read the one that a run is still writing.
"""

import io
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from scripts.utils import files

RESULTS = ".hparams"  # ends the name of the file with a run's results
_numbers = iter(range(10**9))


class EventFile:
    """A new event file in ``folder``; made whole from its first record on."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / _name()
        self._file: IO[bytes] = self.path.open("xb")
        self._write(_version())

    def hparams(self, run: str, values: Mapping[str, Any]) -> None:
        self._write(_event(_settings(run, values, time.time())))

    def text(self, name: str, text: str) -> None:
        """``text`` as TensorBoard's TEXT page shows it: as it stands, not as Markdown."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._write(_event(text_pb(name, "".join(f"    {line}\n" for line in text.splitlines()))))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._write(_event(_scalars(values), step))

    def _write(self, event: Any) -> None:
        _records(self._file, [event])
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def put_results(
    folder: Path, run: str, settings: Mapping[str, Any], results: Mapping[str, float], step: int, started: float
) -> bool:
    """Write the settings and results of an ended run into its TensorBoard ``folder``, once; False where they are there.

    ``started``: seconds since 1970. Older results, of an evaluation that was made again, are taken away.
    """
    content = files.sha256_json([run, dict(settings), dict(results), step, started])[:8]
    there = [path for path in folder.glob("events.out.tfevents.*") if path.name.endswith(RESULTS)]
    if any(path.name.endswith(f".{content}{RESULTS}") for path in there):
        return False
    written = io.BytesIO()
    _records(
        written,
        [_version(), _event(_settings(run, settings, started)), _event(_scalars(results), step), _event(_end())],
    )
    with files.atomic_writer(folder / f"{_name()}.{content}{RESULTS}") as file:
        file.write(written.getvalue())
    for path in there:
        path.unlink(missing_ok=True)
    return True


def _name() -> str:
    return f"events.out.tfevents.{int(time.time()):010d}.{os.getpid()}.{next(_numbers)}"


def _records(file: IO[bytes], events: list[Any]) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    writer = RecordWriter(file)
    for event in events:
        writer.write(event.SerializeToString())


def _version() -> Any:
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=time.time(), file_version="brain.Event:2")


def _event(summary: Any, step: int = 0) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=time.time(), step=step, summary=summary)


def _scalars(values: Mapping[str, float]) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])


def _settings(run: str, values: Mapping[str, Any], started: float) -> Any:
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb

    return hparams_pb(dict(values), trial_id=run, start_time_secs=started)


def _end() -> Any:
    """That the session has ended well. (TensorBoard's own function for it needs TensorFlow.)"""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end))
    return Summary(
        value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR)]
    )
