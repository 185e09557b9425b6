"""The child of ``unsloth_probe``: one training step on a tiny model of the wanted architecture, through Unsloth.

Prints a line before each stage and one verdict; what ends this process tells the parent as much by its stage.
"""

import json
import shutil
import sys
import tempfile
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scripts.utils import backends, hardware, trial, unsloth_probe
from scripts.utils.encoding import Encoded
from scripts.utils.loss import fused_loss, on_device
from scripts.utils.packing import to_row
from scripts.utils.schema import Config
from scripts.utils.unsloth_probe import Kind

_TOKENS = 16
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


def _say(line: dict[str, Any]) -> None:
    print(f"\n{trial.MARK}{json.dumps(line)}", flush=True)


def main(question: dict[str, Any]) -> None:
    config, model = Config(**question["config"]), Path(question["model"])
    machine = hardware.detect()
    lenient = config.train.model_copy(
        update={"precision_strict": False}
    )  # a strict refusal is for the run itself to make
    precision = hardware.choose_precision(config.model_copy(update={"train": lenient}), machine).actual
    facts: dict[str, Any] = {"precision": precision}
    facts["xformers"] = xformers_state(config, model, machine, precision, question["xformers_off"])
    stage: Kind = "import"
    try:
        _say({"stage": "import"})
        backends.import_unsloth(facts["xformers"])
        stage = "architecture"
        _say({"stage": "model"})
        with tempfile.TemporaryDirectory() as folder:
            problem = make_tiny(model, Path(folder))
            if problem is None:
                # a small adapter on what the model itself has: wrong names in the config are for the run to refuse
                lora = config.lora.model_copy(update={"r": 4, "target_modules": "auto"})
                # Unsloth's own checkpointing is what most runs on a GPU will take
                train = config.train.model_copy(
                    update={"gradient_checkpointing": config.train.gradient_checkpointing is not False}
                )
                tiny = config.model_copy(update={"lora": lora, "train": train})
                loaded = backends.load_for_training(
                    tiny, Path(folder), "unsloth", precision, machine, facts["xformers"]
                )
                facts["attention"] = loaded.attention
                stage = "step"
                _say({"stage": "step"})
                take_step(loaded.model, precision, machine.device)
                facts["tried"] = "one step on a tiny model of this architecture"
            else:
                facts["tried"] = f"its import only: no tiny model of this architecture can be made here ({problem})"
    except Exception as error:
        facts |= explain(error, stage)
    _say({"verdict": facts})


def xformers_state(config: Config, model: Path, machine: hardware.Hardware, precision: Any, off: str | None) -> str:
    """Run xformers' attention forward and backward; a failure that leaves the device unusable ends this process."""
    if find_spec("xformers") is None:
        return "not installed"
    if config.model.attention in ("sdpa", "eager"):
        return f"off: model.attention is {config.model.attention}"
    if off is not None:
        return f"off: {off}"
    _say({"stage": "xformers"})
    import torch

    try:
        import xformers.ops

        settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
        settings = settings.get("text_config", settings)
        width = head_width(settings) if "num_attention_heads" in settings else 64
        query, key, value = (
            torch.randn(
                1, _TOKENS, 2, width, device=machine.device, dtype=backends.torch_dtype(precision), requires_grad=True
            )
            for _ in range(3)
        )
        mask = xformers.ops.LowerTriangularMask()
        xformers.ops.memory_efficient_attention(query, key, value, attn_bias=mask).sum().backward()
        if machine.device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        if machine.device == "cuda":
            torch.cuda.synchronize()  # raises again where the failure has broken the device for this process
        return f"off: {one_line(error)}"
    return "on"


def head_width(settings: dict[str, Any]) -> int:
    return int(settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"])


def shrink(settings: dict[str, Any]) -> dict[str, Any]:
    """A config.json of the same architecture with few, narrow layers: same head width, same sharing of key heads.

    Every kind of layer stays at least once. Raises ``KeyError`` where the architecture names its sizes otherwise.
    """
    small = {name: value for name, value in settings.items() if name not in ("quantization_config", "auto_map")}
    old, width = settings["num_hidden_layers"], head_width(settings)
    heads, keys = settings["num_attention_heads"], settings.get("num_key_value_heads")
    share = min(heads // (keys or heads), 4)
    few = 2
    while few * share * width < 128:  # bitsandbytes packs no narrower layers on a CPU
        few *= 2
    kinds = settings.get("layer_types") or [None] * old
    layers = sorted({kinds.index(kind) for kind in kinds} | {0, old - 1})
    for name, value in small.items():
        if isinstance(value, list) and len(value) == old:
            small[name] = [value[layer] for layer in layers]
    small |= {
        "num_hidden_layers": len(layers),
        "num_attention_heads": few * share,
        "hidden_size": few * share * width,
        "intermediate_size": 2 * few * share * width,
    }
    if keys:
        small["num_key_value_heads"] = few
    if "max_window_layers" in small:
        small["max_window_layers"] = len(layers)
    for name in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if small.get(name):
            small[name] = 128
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if small.get(name):
            small[name] = max(4, small.get("num_experts_per_tok") or 0)
    return small


def make_tiny(model: Path, folder: Path) -> str | None:
    """Save a random tiny model of ``model``'s architecture with its tokenizer; None, or why that cannot be done."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for path in model.iterdir():
        if path.is_file() and path.suffix not in _WEIGHTS and not path.name.endswith(".index.json"):
            shutil.copy(path, folder)
    try:
        settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(shrink(settings)), encoding="utf-8")
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    except Exception as error:
        return one_line(error)
    return None


def take_step(model: Any, precision: Any, device: str) -> None:
    """Forward and backward as training does them; raises ``ValueError`` where no gradient arrives."""
    import torch

    row = on_device(to_row([Encoded(list(range(1, _TOKENS + 1)), [True] * _TOKENS)]), device)
    model.train()
    with torch.autocast(device, dtype=backends.torch_dtype(precision), enabled=precision != "fp32"):
        loss = fused_loss(model, row)
    loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    if not torch.isfinite(loss) or not any(bool(gradient.abs().max() > 0) for gradient in gradients):
        raise ValueError(f"the tiny model's loss is {float(loss):.4g} and {len(gradients)} weights have a gradient")


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def explain(error: Exception, kind: Kind) -> dict[str, Any]:
    """Kind and reason; a broken import names the package in which it broke."""
    text = one_line(error)
    if "accelerator" in text or "need a GPU" in text:
        return {"kind": "accelerator", "reason": f"it finds no accelerator here ({text})"}
    if kind == "import" or isinstance(error, ImportError):
        root = root_of(error)
        package = broken_package(root)
        version = unsloth_probe.version(package)
        name = f"{package} {version or '(no version known)'}"
        return {"kind": "import", "reason": f"its import fails in {name}: {one_line(root)}"}
    what = "a tiny model of this architecture" if kind == "architecture" else "one step on a tiny model"
    return {"kind": kind, "reason": f"it fails at {what}: {text}"}


def root_of(error: BaseException) -> BaseException:
    """The first of the errors that led to this one; transformers' lazy imports hide it under one of their own each."""
    while error.__cause__:
        error = error.__cause__
    return error


def broken_package(error: BaseException) -> str:
    """The package that is missing, or the last one whose code ran."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return error.name.partition(".")[0]
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame in frames]
    ours = {*sys.stdlib_module_names, "__main__", "scripts", ""}
    return next((name for name in reversed(names) if name not in ours), "unsloth")


if __name__ == "__main__":
    main(json.loads(sys.stdin.read()))
