"""The doctor's trials: torch and attention, bitsandbytes, the first rows; begun together, their lines read one by one."""

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

from scripts.utils import console, doctor_config, doctor_packages, trial
from scripts.utils.findings import Finding, fault, from_json, ok, warning
from scripts.utils.hardware import Hardware, best_precision

if TYPE_CHECKING:
    from scripts.utils.schema import Config

READING = "rendering the first rows"  # the stage of the trial that takes as long as the data is large
NEEDED = {  # packages that a trial imports; one that is missing has a line of its own
    "device": {"torch", "numpy", "psutil"},
    "bitsandbytes": {"torch", "numpy", "bitsandbytes"},
    "rows": {"torch", "numpy", "transformers", "peft", "accelerate", "safetensors", "jinja2"},
}


def lines_of(ended: trial.Ended) -> Iterator[Finding]:
    return (from_json(line["finding"]) for line in ended.said if "finding" in line)


def device(begun: trial.Trial | None, seconds: float) -> Generator[Finding, None, Hardware | None]:
    """The device, then its attention; returns the ``Hardware``, or None where torch could not say."""
    if begun is None:
        return None
    ended = trial.finish(begun, seconds)
    known = ended.get("machine")
    if known is None:
        yield fault("device", "torch-broken", f"torch does not start: {ended.reason}", doctor_packages.mend())
        return None
    capability = tuple(known.pop("capability") or ()) or None
    found = Hardware(**known, capability=capability)
    precision, why = best_precision(found)
    yield ok("device", f"{found.device}: {found.name}, {console.size(found.memory)}; {precision} ({why})")
    if found.device == "cpu" and doctor_packages.wants_cuda():
        hint = "run nvidia-smi, and reboot after an update of the driver; in a container: --gpus all"
        yield fault("device", "gpu-not-seen", "there is an NVIDIA card, but torch finds none", hint)
    yield from lines_of(ended)
    if ended.reason:
        hint = 'SET="model.attention=eager", and please report it (make support-bundle)'
        yield fault("attention", "attention-crashes", f"attention cannot be run: {ended.reason}", hint)
    return found


def bitsandbytes(begun: trial.Trial | None, seconds: float) -> Iterator[Finding]:
    if begun is None:
        return
    ended = trial.finish(begun, seconds)
    yield from lines_of(ended)
    if ended.reason:
        text = f"4-bit weights cannot be made: {ended.reason}"
        yield fault("bitsandbytes", "bitsandbytes-broken", text, doctor_packages.mend())


def rows(begun: trial.Trial | None, seconds: float, config: "Config", falls_back: bool) -> Iterator[Finding]:
    """The model's attention where bitsandbytes will run, and the first rows."""
    if begun is None:
        return
    ended = trial.finish(begun, seconds)
    if falls_back and (taken := ended.get("attention")):
        yield doctor_config.attention(config, taken)
    yield from lines_of(ended)
    if ended.hung and ended.get("stage") == READING:
        text = f"the first rows were not read within {seconds:g} s: large files of one JSON array are read whole"
        yield warning(
            "rows", "rows-slow", text, "convert them to JSON lines, or: python scripts/check.py --seconds 600"
        )
    elif ended.reason:
        text = f"the first rows cannot be looked at: {ended.reason}"
        yield fault("rows", "rows-crash", text, doctor_packages.mend())
