"""What a finished run hands over: the best weights, exported whole to adapters/<run>, with a card.

The folder carries a manifest with the hash of every file, by which it is verified before it is loaded again, and by
which a later export knows that the folder is its own to replace.
"""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import checkpoints, console, files, model_card, model_store, sharding, stamp
from scripts.utils.encoding import Encoded
from scripts.utils.errors import DivergedError, RefusedError

if TYPE_CHECKING:
    from scripts.utils.schema import Config

MANIFEST = "sft-adapter.json"
_AGAIN = "move the folder away and type the run's make train again: it is exported anew from the run's checkpoints"


def take_best(trainer: Any) -> str | None:
    """Put the weights of the best checkpoint into the model; None when the last step is the best, or none was chosen."""
    best = trainer.state.best_model_checkpoint
    if not trainer.chooses_best or not best or trainer.state.best_global_step == trainer.state.global_step:
        return None
    folder = Path(trainer.args.output_dir) / Path(best).name
    if reason := checkpoints.damage(folder):
        console.warn(f"the best checkpoint cannot be taken, {folder}: {reason}; the last step is exported instead")
        return None
    load_weights(trainer.model, folder)
    return str(folder)


def load_weights(model: Any, folder: Path) -> None:
    """Put the safetensors weights in ``folder`` into a model that trains, each into its place.

    Raises ``RefusedError`` when a weight has no place, a trained one is missing, or a shape differs: PEFT only warns.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    wanted = trained_state(model)
    try:
        parts = sorted(
            folder.glob("adapter_model.safetensors" if hasattr(model, "peft_config") else "*model*.safetensors")
        )
        found = {name: value for part in parts for name, value in load_file(str(part)).items()}
    except (OSError, SafetensorError) as error:
        raise RefusedError(f"{folder.absolute()}: the weights do not load: {error}", "the file is damaged") from error
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    # tied weights are written once
    missing = [name for name in wanted if name not in found] if hasattr(model, "peft_config") else []
    odd = [name for name, shape in shapes.items() if name not in wanted or shape != tuple(wanted[name].shape)]
    if not found or missing or odd:
        raise RefusedError(
            f"{folder.absolute()}: its weights do not fit this model ({len(odd)} without a place or of another shape, "
            f"{len(missing)} missing), e.g. {(odd + missing)[:2]}",
            "use the base model and the lora settings that it was trained with",
        )
    found = {name: sharding.as_in(wanted[name], value) for name, value in found.items()}
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, found)
    else:
        model.load_state_dict(found, strict=False)


def trained_state(model: Any) -> dict[str, Any]:
    """The weights that are written: the adapter's by PEFT's names, or all of a fully tuned model."""
    if not hasattr(model, "peft_config"):
        return dict(model.state_dict())
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def save_weights(model: Any, folder: Path, whole: dict[str, Any] | None = None) -> None:
    """Write the adapter with its settings (or the whole tuned model) as safetensors.

    ``whole``: its ``trained_state`` where the model itself is in shards.
    """
    if not hasattr(model, "peft_config"):
        model.save_pretrained(str(folder), safe_serialization=True, **({"state_dict": whole} if whole else {}))
        return
    from safetensors.torch import save_file

    # PEFT's own save_pretrained asks the hub about the vocabulary and renders a model card each time
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().contiguous() for name, value in (whole or trained_state(model)).items()}
    save_file(state, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    files.usual_mode(folder / "adapter_model.safetensors")
    shape = copy.copy(model.peft_config[model.active_adapter])
    shape.inference_mode = True
    shape.save_pretrained(str(folder))


def export(
    run: str,
    model: Any,
    tokenizer: Any,
    config: "Config",
    examples: Sequence[Encoded],
    state: Any,
    check: Callable[[Path], None] | None = None,
    whole: dict[str, Any] | None = None,
) -> str:
    """Write adapters/<run> atomically: weights, tokenizer with its template, generation config, model card.

    ``check`` is called with the new folder before it takes the old one's place; ``whole`` as for ``save_weights``.
    Returns the hash of the export.
    Raises ``DivergedError`` when a trained weight is not a finite number.
    """
    import torch

    for name, weight in model.named_parameters():
        if weight.requires_grad and not bool(torch.isfinite(sharding.local(weight)).all()):
            raise DivergedError(
                f"the trained weight {name} is not finite", "lower train.learning_rate; checkpoints are kept"
            )
    with files.replaced_folder(stamp.adapter_folder(run), MANIFEST) as folder:
        save_weights(model, folder, whole)
        tokenizer.save_pretrained(str(folder))
        _write_generation_config(folder, model, tokenizer, examples)
        shape = folder / "adapter_config.json"
        if shape.is_file():
            # a name that says the same in every clone, not the place on this machine
            values, base = json.loads(shape.read_text(encoding="utf-8")), stamp.require(run)["model"]
            place = model_store.present(base["name"], base["revision"])
            values["base_model_name_or_path"] = model_card.loadable_base(base["name"], place)
            values["revision"] = base["revision"]
            files.write_json(shape, values)
        files.write_text(folder / "README.md", _card(run, config, state))
        entries = checkpoints.hashes(folder)
        files.write_json(folder / MANIFEST, {"run": run, "base": stamp.require(run)["model"], "files": entries})
        if check:
            check(folder)
    return files.sha256_json(entries)


def verify(folder: Path, known: str | None = None) -> None:
    """Raise ``RefusedError`` unless an exported folder is as it was written, and the export of hash ``known``.

    A folder without a manifest is somebody else's; what can be checked then is checked when it is attached.
    """
    manifest = folder / MANIFEST
    if pickle := next((p.name for p in sorted(folder.glob("*")) if p.suffix in checkpoints.PICKLES), None):
        raise RefusedError(
            f"{folder.absolute()} holds a pickle ({pickle}), which could run any code when loaded",
            "take it out: only safetensors are loaded",
        )
    if not manifest.is_file():
        if known is None:
            return
        raise RefusedError(f"{manifest.absolute()} is missing", _AGAIN)
    try:
        entries = files.read_json(manifest)["files"]
        wrong = checkpoints.difference(folder, entries)
    except (KeyError, TypeError, AttributeError):
        raise RefusedError(f"{manifest.absolute()} is damaged", _AGAIN) from None
    if wrong:
        raise RefusedError(f"{folder.absolute()}: {wrong}", _AGAIN)
    if known is not None and files.sha256_json(entries) != known:
        raise RefusedError(f"{folder.absolute()} is not the adapter that this run exported", _AGAIN)


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
    evals = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    train = config.train
    result = {
        "steps": state.global_step,
        "best_eval_loss": min(evals) if evals else None,
        "recipe": f"learning rate {train.learning_rate:g}, {train.scheduler}, batch {train.micro_batch} x {train.gradient_accumulation}, "
        f"seed {train.seed}",
    }
    return model_card.card(
        run, stamp.require(run), what="full" if config.tuning.mode == "full" else "adapter", result=result
    )


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
        "skipped_steps": trainer.run_state.skipped_total,
        "micro_batch_parts": trainer.run_state.divisor,
    }
