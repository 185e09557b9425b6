"""The card (README.md) beside an adapter and on the hub, made from the run's stamp: what it is, of what, how it does.

Facts only: what the stamp, the base model's folder and the evaluation say. What nobody measured is said to be unknown.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

from scripts.utils import model_store, stamp
from scripts.utils.files import REPO_ROOT, read_json

What = Literal["adapter", "full", "merged", "gguf"]
# the embedded model's weights came out of a 4-bit file; on the hub their original lies here
PUBLISHED = {model_store.EMBEDDED_NAME: "HuggingFaceTB/SmolLM2-135M-Instruct"}
_SHOWN = 12  # figures of an evaluation


def loadable_base(name: str, path: Path | None) -> str:
    """What transformers finds the base by: a hub id or folder as it is; the embedded model by its place in the cache.

    The place is relative to the repository's root, so it is the same in every clone.
    """
    if name in PUBLISHED and path and path.is_relative_to(REPO_ROOT):
        return path.relative_to(REPO_ROOT).as_posix()
    return name


def licence_of(folder: Path | None) -> str | None:
    """The licence that a model folder's README names, as the hub writes it (apache-2.0); None where it names none."""
    readme = folder / "README.md" if folder else None
    if readme is None or not readme.is_file():
        return None
    text = readme.read_text(encoding="utf-8", errors="replace")[:20_000]
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    named = re.search(r"^license(?:_name)?:\s*[\"']?([\w.+-]+)", head.group(1), re.MULTILINE) if head else None
    named = named or re.search(
        r"\blicen[cs]e[:\s]+(Apache-2\.0|MIT|BSD-[23]-Clause|GPL-[23]\.0|CC-BY[\w.-]*)", text, re.IGNORECASE
    )
    return named.group(1).lower().rstrip(".") if named else None


def evaluation_of(run: str) -> dict[str, Any] | None:
    """The run's newest evaluation, where it was evaluated."""
    path = stamp.run_folder(run) / "eval" / "metrics.json"
    return read_json(path) if path.is_file() else None


def card(
    run: str,
    facts: dict[str, Any],
    *,
    what: What,
    result: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    where: str | None = None,
) -> str:
    """The whole text. ``result``: figures of training (else the stamp's); ``where``: hub id or folder to load it by."""
    name, mode = facts["model"]["name"], facts["tuning"]["mode"]
    path = model_store.present(name, facts["model"].get("revision"))
    licence = licence_of(path)
    base = PUBLISHED.get(name, name)
    kind = {
        "adapter": "LoRA adapter",
        "gguf": "GGUF file",
        "merged": "model with its adapter merged in",
        "full": "fully tuned model",
    }
    head = {
        "base_model": base,
        "base_model_relation": {"adapter": "adapter", "gguf": "quantized"}.get(what, "finetune"),
        "library_name": "peft" if what == "adapter" else "gguf" if what == "gguf" else "transformers",
        "pipeline_tag": "text-generation",
        **({"license": licence} if licence else {}),
        "tags": ["sft-play", "sft", *(["lora"] if mode != "full" else [])],
    }
    lines = [
        "---",
        *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()),
        "---",
        "",
        f"# {run}",
        "",
        f"A {kind[what]} of `{base}`, trained with SFT-Play.",
        "",
        *_how_to_load(run, facts, what, path, where or str(stamp.adapter_folder(run))),
        "## How it was trained",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {label} | {value} |" for label, value in _training(facts, result or facts.get("result") or {})),
        "",
        "## How it does",
        "",
        *_figures(evaluation),
        "## Licence and limits",
        "",
        f"- Licence of the base model: {licence or 'its folder names none; see its page'}. It holds for what is made of it.",
        *(f"- {limit}" for limit in _limits(facts, evaluation, what)),
        "",
    ]
    return "\n".join(stamp.without_secrets(lines))


def _how_to_load(run: str, facts: dict[str, Any], what: What, path: Path | None, where: str) -> list[str]:
    lines = ["## How to use it", ""]
    if what == "gguf":
        return [*lines, "```", f"llama-server -m {run}-f16.gguf   # or another file of this folder", "```", ""]
    kind = "peft import AutoPeftModelForCausalLM" if what == "adapter" else "transformers import AutoModelForCausalLM"
    lines += [
        "```python",
        f"from {kind}",
        "from transformers import AutoTokenizer",
        f'model, tokenizer = {kind.split()[-1]}.from_pretrained("{where}"), AutoTokenizer.from_pretrained("{where}")',
        "```",
        "",
        "The chat template is in the tokenizer: `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`.",
    ]
    if what == "adapter" and facts["model"]["name"] in PUBLISHED and where.startswith("adapters/"):
        lines.append(
            "Type it in the root of the SFT-Play clone: the base is found in its `.cache/models` (`make download-model`)."
        )
    elif what == "adapter" and path and path.is_relative_to(REPO_ROOT):
        near = path.relative_to(REPO_ROOT).as_posix()
        lines.append(
            f"Without a network, in the root of the SFT-Play clone: `PeftModel.from_pretrained("
            f'AutoModelForCausalLM.from_pretrained("{near}"), "{where}")`.'
        )
    if what == "adapter" and facts["tuning"]["mode"] == "qlora":
        lines.append("It was trained on 4-bit (NF4) weights of the base: load the base so to have exactly that model.")
    if where.startswith("adapters/"):
        lines.append(f"In the clone also: `make infer RUN={run}`, `make merge RUN={run}`.")
    return [*lines, ""]


def _training(facts: dict[str, Any], result: dict[str, Any]) -> list[tuple[str, str]]:
    data, tuning = facts["data"], facts["tuning"]
    splits = data.get("splits") or {}
    lora = tuning.get("lora")
    shape = f", r {lora['r']}, alpha {lora['alpha']}, on {', '.join(tuning['target_modules'])}" if lora else ""
    loss = result.get("best_eval_loss")
    found = [
        ("base model", f"`{facts['model']['name']}`, content sha256 `{(facts['model'].get('path_hash') or '?')[:16]}`"),
        ("rows", ", ".join(f"{count:,} {split}" for split, count in splits.items()) or "unknown"),
        ("data", f"sha256 `{data['hash'][:16]}` (the rows are not published with it)"),
        ("tuning", tuning["mode"] + shape),
        ("steps", f"{result['steps']:,}" if "steps" in result else "unknown"),
        ("best validation loss", f"{loss:.4f}" if loss is not None else "not measured"),
        ("precision", facts["precision"]["actual"]),
        (
            "chat template",
            f"{facts['render'].get('template', 'in the tokenizer')}, up to {facts['render']['max_length']:,} tokens a row",
        ),
    ]
    if "backend" in facts:
        found.insert(-1, ("backend", facts["backend"]["actual"]))
    if recipe := result.get("recipe"):
        found.insert(-2, ("settings", recipe))
    if text := stamp.system_of(facts):
        found.append(("system message", json.dumps(text, ensure_ascii=False)))
    return found


def _figures(evaluation: dict[str, Any] | None) -> list[str]:
    """Base and tuned beside one another, as eval wrote them."""
    if not evaluation:
        return ["Not evaluated yet: nothing is known about how it does beyond its training.", ""]
    settings = evaluation.get("settings", {})
    both = [
        (name, value, evaluation["tuned"].get(name))
        for name, value in (evaluation.get("base") or {}).items()
        if isinstance(value, int | float) and isinstance(evaluation["tuned"].get(name), int | float)
    ]
    return [
        f"On {settings.get('rows', '?')} {settings.get('split', '')} rows, greedy decoding, base and tuned alike:",
        "",
        "| | base | tuned |",
        "| --- | --- | --- |",
        *(f"| {name.replace('_', ' ')} | {base:.4g} | {tuned:.4g} |" for name, base, tuned in both[:_SHOWN]),
        "",
    ]


def _limits(facts: dict[str, Any], evaluation: dict[str, Any] | None, what: What) -> list[str]:
    found = [
        "It was tuned for one task, with the rows counted above; what the base model knows or gets wrong beside it was not looked at.",
        "Held-out rows come from the same source as the training rows: figures say little about other inputs.",
    ]
    if evaluation and (evaluation.get("settings") or {}).get("rows", 1000) < 100:
        found.append("Fewer than 100 rows were evaluated: small differences are chance.")
    if facts["model"]["name"] in PUBLISHED:
        found.append(
            f"It was trained on weights that were read out of a 4-bit file of `{PUBLISHED[facts['model']['name']]}`; on the "
            "published weights it answers slightly otherwise."
        )
    if what == "gguf":
        found.append("The quantised files round: f16 and bf16 little, q8_0 more.")
    return found
