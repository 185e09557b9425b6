"""A new process loads what was exported and must see the loss that the training process saw.

It proves that the folder is complete by itself: nothing of the process that trained is left to help.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.utils import console, files, ranks, trained
from scripts.utils.encoding import Encoded
from scripts.utils.errors import MachineError, RefusedError
from scripts.utils.loss import batch_loss

SECONDS = 900
# relative and absolute, of the mean loss a token: 16-bit kernels differ between a training and an inference process
_TOLERANCE = {"fp32": (1e-3, 1e-4)}
_TOLERANCE_16 = (5e-2, 5e-2)


def prepare(run: str, trainer: Any, examples: Sequence[Encoded]) -> Callable[[Path], None]:
    """Measure the shortest example's loss now; the result tests an exported folder against it.

    The test raises ``RefusedError`` when the loss differs or the adapter does not load or has no effect.
    """
    example = min(examples, key=lambda e: (e.trained_tokens == 0, len(e.ids)))
    with trainer.compute_loss_context_manager():
        total, count = batch_loss(trainer.model, [example], len(example.ids), loss=trainer.loss)
    expected = total / max(count, 1)

    def test(folder: Path) -> None:
        request = {"run": run, "folder": str(folder), "ids": example.ids, "trained": example.trained}
        console.note("train", "loading the exported adapter in a new process")
        answer = _ask(request)
        if "skipped" in answer:
            console.warn(f"the export was not tested in a new process: {answer['skipped']}")
            return
        relative, absolute = _TOLERANCE.get(answer["precision"], _TOLERANCE_16)
        if "loss" not in answer or not abs(answer["loss"] - expected) <= relative * abs(expected) + absolute:
            raise RefusedError(
                f"the exported weights do not give the loss they were trained to: {expected:.5f} here, "
                f"{answer.get('loss', answer.get('error'))} in a new process",
                "this is a bug worth reporting; the run's checkpoints are kept. train.self_test: false exports untested",
            )

    return test


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, (str(files.REPO_ROOT), os.environ.get("PYTHONPATH"))))
    # the environment first, as in every step: it hides what would break transformers' imports
    code = (
        "from scripts.utils import environment; from pathlib import Path; "
        f"environment.prepare(Path({str(files.REPO_ROOT)!r})); environment.serve_one_command(); from scripts.utils import self_test; self_test.child()"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={**ranks.outside(os.environ), "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"it did not end within {SECONDS} seconds"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        if done.returncode < 0:  # killed from outside, most often for memory
            return {"skipped": f"it was ended by signal {-done.returncode}"}
        raise RefusedError(
            f"the exported adapter does not load in a new process: {(done.stderr.strip() or 'no message')[-500:]}",
            "this is a bug worth reporting; the run's checkpoints are kept",
        )
    answer = dict(json.loads(lines[-1]))
    if "refused" in answer:
        raise RefusedError(answer["refused"], "the run's checkpoints are kept")
    return answer


def child() -> None:
    """Runs in the new process: prints one JSON object with the loss, or why there is none."""
    request = json.loads(sys.stdin.read())
    try:
        model, precision = trained.load_export(request["run"], Path(request["folder"]))
        total, count = batch_loss(model, [Encoded(request["ids"], request["trained"])], len(request["ids"]))
        answer: dict[str, Any] = {"loss": total / max(count, 1), "precision": precision}
    except MachineError as error:
        answer = {"skipped": error.message}
    except RefusedError as error:
        answer = {"refused": error.message}
    print("\n" + json.dumps(answer), flush=True)
