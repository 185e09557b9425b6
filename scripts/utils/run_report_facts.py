"""How a run was run, for its report: facts from the stamp and from metrics.json. What an older version did not write is left out."""

from collections.abc import Mapping
from typing import Any

from scripts.utils import console

Facts = list[tuple[str, str]]


def how_it_was_run(stamp: Mapping[str, Any], found: Mapping[str, Any] | None, adapter: str) -> list[tuple[str, Facts]]:
    """Titles with their facts, in the order of the page; ``adapter``: where the result lies."""
    groups = [
        ("Model and tuning", [*_model(stamp), ("result lies in", adapter)]),
        ("Data", _data(stamp)),
        ("Settings", _settings(stamp)),
        ("Outcome of the training", _outcome(stamp)),
        ("Evaluation", _evaluation(found) if found else []),
        ("Machine and software", _machine(stamp)),
    ]
    known = [(title, [(name, text) for name, text in facts if text]) for title, facts in groups]
    return [(title, facts) for title, facts in known if facts]


def when(time: str) -> str:
    return time.replace("T", " ").replace("Z", " UTC")


def _model(stamp: Mapping[str, Any]) -> Facts:
    model, tuning = stamp["model"], stamp["tuning"]
    lora = tuning.get("lora")
    shape = f", r {lora['r']}, alpha {lora['alpha']}, dropout {lora['dropout']:g}" if lora else ""
    revision = f", revision {model['revision']}" if model.get("revision") else ""
    backend, precision, engine = (stamp.get(key) or {} for key in ("backend", "precision", "engine"))
    ways = [
        *(["packed rows"] if engine.get("packing") else []),
        *(["attention by segment"] if engine.get("segments") else []),
        *(["variable-length attention kernel"] if engine.get("kernel") else []),
        *(["shared beginnings computed once"] if engine.get("shared") else []),
        *(["loss in chunks"] if engine.get("chunked") else []),
        *(["lean LoRA"] if engine.get("lean") else []),
        *([f"fused kernels of {engine['fused']}"] if engine.get("fused") else []),
    ]
    return [
        ("base model", f"{model['name']}{revision}"),
        ("its content", _hash(model.get("path_hash"))),
        ("tuning", f"{tuning['mode']}{shape}"),
        ("on", ", ".join(tuning.get("target_modules") or [])),
        ("began with", f"the adapter {tuning['init_adapter']}" if tuning.get("init_adapter") else ""),
        ("backend", f"{backend['actual']} (asked for: {backend['requested']})" if backend else ""),
        ("precision", f"{precision.get('actual', '')}{_bracket(precision.get('why'))}"),
        ("quantisation", stamp.get("quantisation") or ""),
        ("attention", str(stamp.get("attention") or "")),
        ("engine", ", ".join(ways) + ("; each compared with the plain way" if ways else "")),
        ("gradient checkpointing", _on_off(stamp.get("gradient_checkpointing"))),
        ("memory by plan", _plan(stamp.get("plan"))),
    ]


def _data(stamp: Mapping[str, Any]) -> Facts:
    data, tokens, style = stamp["data"], stamp["data"].get("tokens") or {}, stamp.get("style") or {}
    render, system = stamp["render"], stamp.get("system") or ""
    rows = ", ".join(f"{count:,} {split}" for split, count in (data.get("splits") or {}).items())
    counted = f"{tokens['total']:,}, of which {tokens['trained']:,} carry loss" if "trained" in tokens else ""
    return [
        ("name", data["name"]),
        ("rows", rows),
        ("tokens", counted),
        ("content", _hash(data.get("hash"))),
        ("chat template", f"{render.get('template', '')}{_bracket(_hash(render.get('template_hash')))}"),
        ("rows up to", f"{render['max_length']:,} tokens"),
        ("style", f"{style['text']}{_bracket(style.get('mode'))}" if style.get("text") else ""),
        ("system message of every row", system if system != style.get("text") else ""),
    ]


def _settings(stamp: Mapping[str, Any]) -> Facts:
    """What decides the loss curve, and is not said elsewhere."""
    elsewhere = {"backend", "model", "mode", "lora", "init_adapter", "precision", "data", "template", "max_length"}
    chosen = {key: value for key, value in (stamp.get("identity") or {}).items() if key not in elsewhere}
    return [(key.replace("_", " "), _plain(value)) for key, value in chosen.items() if value is not None]


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _outcome(stamp: Mapping[str, Any]) -> Facts:
    result = stamp.get("result")
    if not result:
        return []
    losses = {"mean train loss": result.get("train_loss"), "best validation loss": result.get("best_eval_loss")}
    return [
        ("steps", f"{result['steps']:,}"),
        ("tokens read", f"{result['tokens']:,}"),
        *((name, f"{loss:.4f}") for name, loss in losses.items() if loss is not None),
        ("kept", str(result.get("kept", ""))),
    ]


def _evaluation(found: Mapping[str, Any]) -> Facts:
    settings, model = found["settings"], found.get("model", {})
    facts = [
        ("rows", f"{settings['rows']:,} of {found['data']['available']:,} {settings['split']} rows, evenly spread"),
        (
            "answers",
            f"greedy, {settings['max_new_tokens']:,} new tokens at most, same for both sides"
            if settings["generate"]
            else "none were generated (eval.generate: false)",
        ),
        ("computed in", f"{model.get('precision', '')} on {model.get('device', '')}" if model else ""),
        ("took", console.duration(found["seconds"]) if "seconds" in found else ""),
        ("at", when(found.get("at", ""))),
    ]
    for side, speed in (found.get("speed") or {}).items():
        if speed and speed.get("tokens_per_second") is not None:
            each = speed.get("seconds_per_answer")
            facts.append(
                (
                    f"speed, {side}",
                    f"{speed['tokens_per_second']:,.1f} tokens/s" + (f", {each:.2f} s an answer" if each else ""),
                )
            )
    return facts


def _machine(stamp: Mapping[str, Any]) -> Facts:
    hardware, git = stamp.get("hardware") or {}, stamp.get("git") or {}
    return [
        ("machine", f"{hardware['name']}, {console.size(hardware['memory'])}" if hardware else ""),
        ("driver", str(hardware.get("driver") or "")),
        ("versions", ", ".join(f"{name} {version}" for name, version in (stamp.get("versions") or {}).items())),
        ("code", f"git {git['commit'][:12]}{', with uncommitted changes' if git.get('dirty') else ''}" if git else ""),
        ("config", _hash(stamp.get("config_hash"))),
    ]


def _hash(value: object) -> str:
    return f"sha256 {str(value)[:12]}…" if value else ""


def _bracket(text: object) -> str:
    return f" ({text})" if text else ""


def _on_off(value: object) -> str:
    return "" if value is None else "on" if value else "off"


def _plan(plan: Mapping[str, Any] | None) -> str:
    return f"{console.size(plan['predicted_peak'])} of {console.size(plan['usable'])} usable" if plan else ""
