"""The rhythm of a run: when it logs, evaluates, saves and stops, and what it says meanwhile."""

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from scripts.utils import console, ranks, resume, stop_signals, trackers

if TYPE_CHECKING:
    from scripts.utils.training import SFTTrainer


class Rhythm(TrainerCallback):
    """When to evaluate, save and stop; which checkpoint is best; what a signal does."""

    def __init__(self, trainer_of: Callable[[], "SFTTrainer"]) -> None:
        self.trainer_of = trainer_of
        self.handlers: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer_of()
        trainer.restore_counters()
        trainer.begin_sharing()
        trainer.try_save()

        def ask_to_stop(number: int, frame: object) -> None:
            # a launcher and the terminal each tell every rank
            if stop_signals.is_echo(number, of_any=ranks.world_size() > 1):
                return
            if trainer.run_state.asked_signal is not None:
                raise stop_signals.exception(number)  # the second time at once
            trainer.run_state.asked_signal = number
            if ranks.world_size() > 1:
                return  # one of them cannot stop alone: they agree on it in the next step, and say so
            trainer.run_state.stop_signal = number
            console.note_in_handler(
                "train", "stopping after this step and saving; press Ctrl-C again to stop at once, without saving"
            )

        self.handlers = stop_signals.handle(ask_to_stop)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        stop_signals.put_back(self.handlers)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer_of().refuse_broken_weights()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer_of()
        train, step = trainer.config.train, state.global_step
        last = step >= len(trainer.schedule.steps)
        control.should_log = step % train.logging_steps == 0 or step == 1 or last
        control.should_evaluate = bool(trainer.val) and trainer.schedule.is_due(
            step, train.eval_strategy, train.eval_steps
        )
        control.should_save = trainer.saves_at(step) or trainer.run_state.overdue
        if trainer.run_state.stop_signal is not None:
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        trainer = self.trainer_of()
        train = trainer.config.train
        loss = metrics["eval_loss"]
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric = loss
            state.best_global_step = state.global_step
            if train.save_strategy != "no":
                state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.global_step}")
                control.should_save = True  # the best one is always there to go back to
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if resume.stops_early(losses, train.early_stopping_patience):
            console.note(
                "train",
                f"early stop: {train.early_stopping_patience} evaluations without a lower validation loss",
            )
            control.should_training_stop = control.should_save = True


class Report(TrainerCallback):
    """One line an event: step, loss, rate, memory, time left."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.start: tuple[float, int] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.start is None:
            self.start = (time.monotonic(), state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        logs = logs or {}
        step = state.global_step
        if "loss" in logs and self.start:
            done = max(step - self.start[1], 1)
            left = (time.monotonic() - self.start[0]) / done * (self.total - step)
            console.note(
                "train",
                f"step {step}/{self.total}  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  "
                f"{logs['tokens_per_second']:,.0f} tok/s  {logs['memory_gib']:.1f} GiB  {console.duration(left)} left",
            )
        elif "eval_loss" in logs:
            console.note(
                "train",
                f"step {step}/{self.total}  val loss {logs['eval_loss']:.4f}  perplexity {logs['eval_perplexity']:.3f}",
            )


class Tracked(TrainerCallback):
    """What is logged goes to the trackers too (scripts/utils/trackers.py); none of them can stop the run."""

    def __init__(self, names: Sequence[str], record: trackers.Record) -> None:
        self.names, self.record = names, record
        self.open: list[trackers.Guarded] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.open = trackers.open_all(self.names, self.record)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        for tracker in self.open:
            tracker.log(trackers.by_group(logs or {}), state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.best_metric is not None:
            for tracker in self.open:
                tracker.log({"eval/best_loss": state.best_metric}, state.global_step)
        self.close()

    def close(self) -> None:
        """Finish the records; also where the training ended with an error."""
        while self.open:
            self.open.pop().finish()
