"""A model as a run left it: the base with its adapter, the fully tuned model, or the merged one.

All facts (base model, precision, quantisation, template) come from the run's stamp and its adapter folder, never from
a config that may have been edited since.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scripts.utils import adapters, console, files, model_store, stamp
from scripts.utils.backends import load_causal_lm, spare_bitsandbytes
from scripts.utils.chat import Template, choose_template, load_tokenizer
from scripts.utils.errors import MachineError, RefusedError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from scripts.utils.hardware import Hardware, Precision

Which = Literal["tuned", "base", "merged"]


@dataclass(frozen=True)
class Trained:
    """A model ready to answer. ``max_length`` is its context limit in tokens; ``stamp`` is empty without a run.

    ``folder`` holds the weights that make it what it is: the adapter, or the whole model.
    """

    run: str
    model: Any
    tokenizer: "PreTrainedTokenizerBase"
    template: Template
    device: str
    precision: str
    stamp: dict[str, Any]
    kind: Literal["adapter", "full", "merged", "base"]
    stop_ids: list[int]
    max_length: int
    folder: Path

    @property
    def identity(self) -> dict[str, Any]:
        """What answers, by content: the same model, in the same precision on the same kind of device, answers alike."""
        base = self.stamp.get("model", {}).get("path_hash") if self.kind == "adapter" else None
        return {
            "weights": model_store.content_hash(self.folder),
            "base": base,
            "precision": self.precision,
            "device": self.device,
        }


@dataclass(frozen=True)
class Found:
    """What a run left on the disk, proven but not loaded: ``weights`` is the folder of a whole model, ``adapter`` what
    goes on top of it, and ``folder`` the one whose tokenizer, template and end tokens count."""

    facts: dict[str, Any]
    kind: Literal["adapter", "full", "merged", "base"]
    folder: Path
    weights: Path
    adapter: Path | None
    quantised: bool
    tokenizer: "PreTrainedTokenizerBase"
    template: Template


def find_trained(run: str, *, which: Which = "tuned") -> Found:
    """Find what a run left. Raises ``UserError`` when the run, its adapter or its merged model is not there."""
    facts = stamp.require(run)
    adapter = stamp.adapter_folder(run)
    folder = stamp.run_folder(run) / "merged" if which == "merged" else adapter
    if which == "merged" and not (folder / "config.json").is_file():
        raise UserError(
            f"run {run!r} has no merged model (looked in {folder.absolute()})", f"run: make merge RUN={run}"
        )
    full = facts["tuning"]["mode"] == "full"
    needed = folder / ("config.json" if full or which == "merged" else "adapter_config.json")
    if which == "tuned" and not needed.is_file():
        ended = facts["starts"][-1]["ended"]
        raise UserError(
            f"run {run!r} has no adapter (looked for {needed.absolute()}); its last start ended: {ended}",
            f"finish it: make train RUN={run} with the same CONFIG; or ask for the base model with --which base",
        )
    if which == "tuned":
        adapters.verify(adapter, facts.get("result", {}).get("export"))
    tokenizer = load_tokenizer(folder if folder.is_dir() else base_path(facts))
    template = choose_template(tokenizer, "auto")
    if (then := facts["render"].get("template_hash")) and template.hash != then:
        console.warn(f"{folder}: the chat template is not the one that run {run!r} was trained with")
    kind: Literal["adapter", "full", "merged", "base"] = (
        "merged" if which == "merged" else "base" if which == "base" else "full" if full else "adapter"
    )
    return Found(
        facts,
        kind,
        folder,
        folder if kind in ("merged", "full") else base_path(facts),
        adapter if kind == "adapter" else None,
        facts["tuning"]["mode"] == "qlora" and which != "merged",
        tokenizer,
        template,
    )


def load_trained(run: str, *, which: Which = "tuned") -> Trained:
    """Load what a run left. Raises as ``find_trained`` does."""
    found = find_trained(run, which=which)
    hardware, precision = inference_precision(found.facts["precision"]["actual"])
    model = _load(found.weights, precision, hardware.device, quantised=found.quantised)
    if found.adapter:
        model = attach_adapter(model, found.adapter)
    own_ends = found.folder / "generation_config.json"
    if own_ends.is_file():  # the end-of-turn token that was learnt may be another than the base model's
        model.generation_config.eos_token_id = files.read_json(own_ends).get("eos_token_id")
    folder = found.adapter or found.weights
    return _ready(
        run, model, found.tokenizer, found.template, hardware.device, precision, found.facts, found.kind, folder
    )


def load_base_model(name: str, revision: str | None = None) -> Trained:
    """A model without any run: hub id, folder or embedded/…, with its own template."""
    path = model_store.resolve(name, revision).path
    tokenizer = load_tokenizer(path)
    hardware, precision = inference_precision(None)
    model = _load(path, precision, hardware.device)
    template = choose_template(tokenizer, "auto")
    return _ready("", model, tokenizer, template, hardware.device, precision, {}, "base", path)


def load_export(run: str, folder: Path) -> tuple[Any, str]:
    """The model that ``folder`` (an export of ``run``, wherever it lies) makes, and the precision it computes in.

    Raises ``MachineError`` where this machine has no room for it beside the training process.
    """
    facts = stamp.require(run)
    adapters.verify(folder)
    full = facts["tuning"]["mode"] == "full"
    path = folder if full else base_path(facts)
    machine, precision = inference_precision(facts["precision"]["actual"])
    device = _device_with_room(machine.device, sum(p.stat().st_size for p in path.glob("*.safetensors")))
    model = _load(path, precision, device, quantised=facts["tuning"]["mode"] == "qlora")
    return model.eval() if full else attach_adapter(model, folder), precision


def _load(path: Path, precision: "Precision", device: str, *, quantised: bool = False) -> Any:
    if not quantised:
        spare_bitsandbytes(path)
    return load_causal_lm(path, precision=precision, device=device, quantised=quantised)


def _device_with_room(device: str, need: int) -> str:
    import psutil
    import torch

    if device == "cuda" and torch.cuda.mem_get_info()[0] > 1.2 * need + 2**30:
        return device
    if device == "mps" or psutil.virtual_memory().available < 2 * need:
        raise MachineError("not enough memory for a second copy of the model")
    return "cpu"


def attach_adapter(model: Any, adapter: Path) -> Any:
    """Put the adapter on the base model and prove that every weight of its file found its place.

    PEFT only warns when keys do not match. Raises ``RefusedError`` for a pickled, damaged or foreign adapter.
    """
    from peft import PeftModel
    from safetensors import SafetensorError, safe_open

    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise RefusedError(
            f"{weights.absolute()} is missing", "only safetensors adapters are loaded; train the run again"
        )
    try:
        with safe_open(str(weights), framework="pt") as file:
            wanted = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        model = PeftModel.from_pretrained(model, str(adapter), is_trainable=False)
    except (SafetensorError, RuntimeError, ValueError, TypeError) as error:
        raise RefusedError(
            f"{adapter.absolute()}: the adapter does not load: {error}", "it is damaged or of another base"
        ) from error
    from peft import get_peft_model_state_dict

    loaded = {
        name: tuple(value.shape)
        for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    if not wanted or wanted != loaded:
        odd = sorted(set(wanted.items()) ^ set(loaded.items()))[:3]
        raise RefusedError(
            f"{adapter.absolute()}: its weights do not fit this base model, e.g. {odd}", "use the base of its stamp"
        )
    model.eval()
    if not _effect(model) > 0:
        raise RefusedError(
            f"{adapter.absolute()}: the adapter changes nothing (its effect on the logits is {_effect(model)})",
            "it was never trained, or is damaged; train it for at least one step with a learning rate above zero",
        )
    return model


def _effect(model: Any) -> float:
    """Largest change of a logit that the adapter makes, on a few tokens; NaN where the logits are."""
    import torch

    device = next(model.parameters()).device
    ids = torch.arange(3, 19, device=device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        tuned = model(input_ids=ids, use_cache=False).logits
        with model.disable_adapter():
            base = model(input_ids=ids, use_cache=False).logits
    return float((tuned - base).abs().max())


@contextlib.contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Within this block the base model answers, from the same weights."""
    with model.disable_adapter():
        yield


def base_path(facts: dict[str, Any]) -> Path:
    """The run's base model, resolved again and proven to be the same bytes."""
    path = model_store.resolve(facts["model"]["name"], facts["model"].get("revision")).path
    if (known := facts["model"].get("path_hash")) and model_store.content_hash(path) != known:
        raise RefusedError(
            f"the model {facts['model']['name']} in {path} is not the one this run was trained on",
            "restore that model, or train a new run on this one",
        )
    return path


def inference_precision(trained_in: str | None) -> "tuple[Hardware, Precision]":
    """The precision that the run was trained in, where this machine has it; else the best it has, on a CPU the exact one."""
    from scripts.utils import hardware

    machine = hardware.detect()
    if trained_in in ("bf16", "fp16", "fp32") and hardware.supported(trained_in, machine)[0]:  # type: ignore[arg-type]
        return machine, trained_in  # type: ignore[return-value]
    # of a model without a run the answer must not hang on which others are asked for beside it
    return machine, "fp32" if machine.device == "cpu" else hardware.best_precision(machine)[0]


def _ready(
    run: str,
    model: Any,
    tokenizer: Any,
    template: Template,
    device: str,
    precision: str,
    facts: dict[str, Any],
    kind: Any,
    folder: Path,
) -> Trained:
    model.eval()
    model.config.use_cache = True
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    return Trained(
        run, model, tokenizer, template, device, precision, facts, kind, stop_ids(model, tokenizer), int(limit), folder
    )


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Whole ids that end an answer: those of the generation config and the tokenizer's end token."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id}
    return sorted(i for i in ids if i is not None)
