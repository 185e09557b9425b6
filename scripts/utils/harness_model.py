"""The trained model as lm-evaluation-harness takes it, and one task run with it. Imports the harness (extra `harness`)."""

import logging
from pathlib import Path
from typing import Any

from scripts.utils import environment
from scripts.utils.chat import render_prompt
from scripts.utils.errors import MachineError, UserError
from scripts.utils.trained import Trained


def wrap(trained: Trained, batch_size: int) -> Any:
    """The harness's own model class around the loaded model; chat prompts are rendered as everywhere here.

    After ``manager``, the first to import the harness.
    """
    from lm_eval.models.huggingface import HFLM
    from transformers import GenerationConfig

    class Model(HFLM):  # type: ignore[misc]
        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            if not add_generation_prompt:  # a task that begins the answer itself
                return str(super().apply_chat_template(chat_history, add_generation_prompt=False))
            return render_prompt(trained.template, trained.tokenizer, chat_history).text

    model = trained.model
    # greedy means greedy: transformers fills what a task leaves open from the model's own settings
    plain = GenerationConfig(eos_token_id=trained.stop_ids, pad_token_id=trained.stop_ids[0] if trained.stop_ids else 0)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for owner in {id(m): m for m in (model, base)}.values():
        owner.generation_config = plain
    # no special tokens are added: a rendered prompt has its own
    return Model(
        pretrained=model,
        tokenizer=trained.tokenizer,
        backend="causal",
        batch_size=batch_size,
        max_length=min(trained.max_length, 1 << 20),
        device=trained.device,
        add_bos_token=False,
    )


def manager(folder: Path, *, all_tasks: bool) -> Any:
    """The harness's list of tasks; its own 10,000 are read only where they are wanted."""
    environment.show_hidden()  # the harness uses datasets and sklearn
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    for part in (
        "models.huggingface",
        "evaluator",
    ):  # they warn that the model was loaded before, and of our own settings
        logging.getLogger(f"lm_eval.{part}").setLevel(logging.ERROR)
    return TaskManager(include_path=str(folder), include_defaults=all_tasks)


def run_task(
    model: Any, task: str | dict[str, Any], tasks: Any, *, chat: bool, system: str | None, **options: Any
) -> dict[str, Any]:
    """The harness's results for one task. Raises ``MachineError`` where its data is out of reach."""
    import lm_eval

    name = task if isinstance(task, str) else task["task"]
    try:
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=tasks,
            apply_chat_template=chat,
            system_instruction=system if chat else None,
            **options,
        )
    except (OSError, ConnectionError) as error:
        raise MachineError(
            f"task {name}: its data cannot be read or fetched ({_first_line(error)})",
            "it lies on the hub: connect, or write a task file for a local copy (configs/harness/gsm8k_jsonl.yaml shows how)",
        ) from error
    except ImportError as error:
        raise MachineError(
            f"task {name} needs a package that is not here: {_first_line(error)}", "install it beside"
        ) from error
    if not found:
        raise UserError(f"task {name} gave no results", "see the messages above")
    return dict(found)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
