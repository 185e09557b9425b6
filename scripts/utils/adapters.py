"""What a finished run hands over: the best weights, exported whole to adapters/<run>, with a card."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import files, stamp
from scripts.utils.encoding import Encoded
from scripts.utils.errors import DivergedError

if TYPE_CHECKING:
    from scripts.utils.schema import Config


def take_best(trainer: Any) -> str | None:
    """Put the weights of the best checkpoint into the model; None when the last step is the best, or none was chosen."""
    from safetensors.torch import load_file

    best = trainer.state.best_model_checkpoint
    if not best or trainer.state.best_global_step == trainer.state.global_step:
        return None
    model = trainer.model
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(str(Path(best) / "adapter_model.safetensors")))
    else:
        for part in sorted(Path(best).glob("*.safetensors")):
            model.load_state_dict(load_file(str(part)), strict=False)
    return str(best)


def save_weights(model: Any, folder: Path) -> None:
    """Write the adapter (or the whole tuned model) as safetensors."""
    if hasattr(model, "peft_config"):
        # embeddings are never trained; left to itself PEFT asks the hub whether the vocabulary grew
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    else:
        model.save_pretrained(str(folder), safe_serialization=True)


def export(run: str, model: Any, tokenizer: Any, config: "Config", examples: Sequence[Encoded], state: Any) -> None:
    """Write adapters/<run> atomically: weights, tokenizer with its template, generation config, model card.

    Raises ``DivergedError`` when a trained weight is not a finite number.
    """
    import torch

    for name, weight in model.named_parameters():
        if weight.requires_grad and not bool(torch.isfinite(weight).all()):
            raise DivergedError(
                f"the trained weight {name} is not finite", "lower train.learning_rate; checkpoints are kept"
            )
    with files.replaced_folder(stamp.adapter_folder(run)) as folder:
        save_weights(model, folder)
        tokenizer.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)
        _write_generation_config(folder, model, tokenizer, examples)
        shape = folder / "adapter_config.json"
        if shape.is_file():
            # the name, not the place on this machine, so that the folder says the same wherever it is copied
            values = json.loads(shape.read_text(encoding="utf-8"))
            values["base_model_name_or_path"] = config.model.name
            files.write_json(shape, values)
        files.write_text(folder / "README.md", _card(run, config, state))


def _write_generation_config(folder: Path, model: Any, tokenizer: Any, examples: Sequence[Encoded]) -> None:
    """End tokens: the model's own, the tokenizer's, and the token that ends the trained answers if it is a special one."""
    known = model.generation_config.eos_token_id
    ends = set(known if isinstance(known, list) else [known]) | {tokenizer.eos_token_id}
    for example in examples[:1]:
        last = max(index for index, trained in enumerate(example.trained) if trained)
        if example.ids[last] in tokenizer.added_tokens_decoder:
            ends.add(example.ids[last])
    values = {"eos_token_id": sorted(end for end in ends if end is not None), "pad_token_id": tokenizer.pad_token_id}
    files.write_json(folder / "generation_config.json", values)


def _card(run: str, config: "Config", state: Any) -> str:
    facts = stamp.require(run)
    evals = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    tuned = "fully tuned model" if config.tuning.mode == "full" else "LoRA adapter"
    lines = [
        "---",
        f"base_model: {json.dumps(config.model.name)}",
        f"library_name: {'transformers' if config.tuning.mode == 'full' else 'peft'}",
        "tags: [sft-play, sft]",
        "---",
        "",
        f"# {run}",
        "",
        f"A {tuned} of `{config.model.name}`, trained with SFT-Play.",
        "",
        "| | |",
        "| --- | --- |",
        f"| steps | {state.global_step} |",
        f"| backend, precision | {facts['backend']['actual']}, {facts['precision']['actual']} |",
        f"| tuning | {config.tuning.mode}, learning rate {config.train.learning_rate:g}, {config.train.scheduler} |",
        f"| data | {facts['data']['splits']['train']} rows, sha256 `{facts['data']['hash'][:16]}` |",
        f"| best validation loss | {min(evals):.4f} |" if evals else "| best validation loss | no val rows |",
        f"| chat template | {facts['render']['template']} |",
        "",
        f"Try it: `make infer RUN={run}`. The whole stamp: `sft-train --show-stamp {run}`.",
        "",
    ]
    return "\n".join(lines)


def result_of(trainer: Any, best: str | None) -> dict[str, Any]:
    """The figures of the end, for the stamp."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evals = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "train_loss": losses[-1] if losses else None,
        "best_eval_loss": min(evals) if evals else None,
        "kept": best or "last step",
        "tokens": trainer.run_state.tokens,
    }
