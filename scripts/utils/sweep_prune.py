"""Runs that are not worth their time: Optuna's percentile pruner, fed from the validation losses in each run's metrics.jsonl.

Nothing is kept beside those files: a sweep that is started again reads them anew.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from scripts.utils import growing
from scripts.utils.errors import MachineError
from scripts.utils.sweep_plan import Run

if TYPE_CHECKING:
    import optuna

    from scripts.utils.sweep_schema import Prune


class Watch:
    """Compares runs of the same rows and base model, at the same step: losses of others say nothing about a run."""

    def __init__(self, settings: "Prune", finished: Iterable[Run]) -> None:
        """``finished``: runs of earlier starts. Raises ``MachineError`` where Optuna is not installed."""
        try:
            import optuna
        except ImportError as error:
            raise MachineError(
                "the plan says prune, and Optuna is not installed",
                "run: make install EXTRAS=sweep, or take prune out of the plan",
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna = optuna
        self.pruner = optuna.pruners.PercentilePruner(
            settings.percentile, n_startup_trials=settings.after_runs, n_warmup_steps=settings.from_step
        )
        self.studies: dict[str, optuna.Study] = {}
        self.trials: dict[str, optuna.Trial] = {}
        self.reported: dict[str, int] = {}
        self.seen: dict[str, tuple[int, int]] = {}
        self.longest: dict[str, int] = {}
        for run in finished:
            self.finished(run)

    def _study(self, run: Run) -> "optuna.Study":
        # the name of the rendered rows: the sweep gives rows of another model or template another one
        if run.data_name not in self.studies:
            self.studies[run.data_name] = self.optuna.create_study(direction="minimize", pruner=self.pruner)
        return self.studies[run.data_name]

    def is_hopeless(self, run: Run) -> bool:
        """Whether a running run is to be given up, by the losses that it has written since the last look."""
        path = run.folder / "metrics.jsonl"
        if not path.is_file():
            return False
        status = path.stat()
        if self.seen.get(run.name) == (status.st_size, status.st_mtime_ns):
            return False
        self.seen[run.name] = (status.st_size, status.st_mtime_ns)
        trial = self.trials.setdefault(run.name, self._study(run).ask())
        for step, loss in losses(run).items():
            if step > self.reported.get(run.name, -1):
                self.reported[run.name] = step
                trial.report(loss, step)
                # at its own end there is nothing left to save by giving up
                if step < self.longest.get(run.data_name, 0) and trial.should_prune():
                    return True
        return False

    def finished(self, run: Run) -> None:
        """A run that ended: the others are compared with it from now on."""
        found = losses(run)
        if not found:
            return
        trial = self.optuna.trial.create_trial(value=min(found.values()), intermediate_values=dict(found))
        self._study(run).add_trial(trial)
        self.longest[run.data_name] = max(self.longest.get(run.data_name, 0), *found)


def losses(run: Run) -> dict[int, float]:
    """Step → validation loss of a run, as far as it has come."""
    found, _ = growing.entries(run.folder / "metrics.jsonl")
    return {entry["step"]: float(entry["eval_loss"]) for entry in found if "eval_loss" in entry}
