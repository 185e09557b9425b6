"""A run as one model folder that an engine loads by the run's name: links to the weights, and the run's own words.

The folder holds the base model's weights with the adapter beside them (transformers puts an adapter that lies in a
model's folder on it), the tokenizer with the run's template, and a generation config with the run's end tokens.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import files
from scripts.utils.trained import Found

if TYPE_CHECKING:
    from scripts.utils.schema import InferSection

# the engine reads a request's temperature only where the default is to sample, so greedy is written as this: the
# likeliest token has to be ahead by a hundredth for all others to be out of the question
ALMOST_GREEDY = 1e-3
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def prepare(found: Found, target: Path, settings: "InferSection", *, with_adapter: bool = True) -> None:
    """Make ``target``; ``settings`` give what holds where a request says nothing. ``with_adapter``: the adapter too."""
    target.mkdir(parents=True)
    weights = [path for path in found.weights.iterdir() if path.suffix == ".safetensors" and path.name != _ADAPTER[1]]
    linked = [*weights, *found.weights.glob("*.safetensors.index.json"), found.weights / "config.json"]
    if found.adapter and with_adapter:
        linked += [found.adapter / name for name in _ADAPTER]
    for path in linked:
        (target / path.name).symlink_to(path.resolve())
    found.tokenizer.chat_template = found.template.text
    found.tokenizer.save_pretrained(str(target))
    files.write_json(target / "generation_config.json", _generation(found, settings))


def _generation(found: Found, settings: "InferSection") -> dict[str, Any]:
    return {
        "eos_token_id": end_tokens(found),
        "pad_token_id": found.tokenizer.pad_token_id,
        "do_sample": True,
        "temperature": max(settings.temperature, ALMOST_GREEDY),
        "top_p": settings.top_p,
        "top_k": 0,
        "max_new_tokens": settings.max_new_tokens,
    }


def end_tokens(found: Found) -> list[int]:
    """The ids that end an answer: those of the run's generation config, else of its base model's, and the tokenizer's."""
    own: Any = None
    places = (found.folder / "generation_config.json", found.weights / "generation_config.json")
    for path in (*places, found.weights / "config.json"):
        if path.is_file():
            own = files.read_json(path).get("eos_token_id")
            break
    ids = {*(own if isinstance(own, list) else [own]), found.tokenizer.eos_token_id}
    return sorted(token for token in ids if token is not None)
