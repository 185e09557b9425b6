"""Which backend a run takes, decided before anything heavy is imported; a fallback comes with its reason and remedy."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from scripts.utils import unsloth_probe
from scripts.utils.errors import MachineError
from scripts.utils.unsloth_probe import Verdict

if TYPE_CHECKING:
    from scripts.utils.schema import Config

Backend = Literal["bitsandbytes", "unsloth"]
REASON_VARIABLE, XFORMERS_VARIABLE = "SFT_FALLBACK_REASON", "SFT_FALLBACK_XFORMERS"
_BITSANDBYTES_HERE = "tuning.backend: bitsandbytes is the choice here and spares the trial"
_REMEDIES: dict[str | None, str] = {
    "absent": "make install EXTRAS=unsloth",
    "accelerator": _BITSANDBYTES_HERE,
    "import": "make install EXTRAS=unsloth, which takes versions that fit one another",
    "architecture": "tuning.backend: bitsandbytes is right for this model",
    "step": "tuning.backend: bitsandbytes is right for this model on this machine",
    "crash": "make check tries it again; until that passes, tuning.backend: bitsandbytes spares the trial",
    "hang": "make check tries it again; until that passes, tuning.backend: bitsandbytes spares the trial",
}


@dataclass(frozen=True)
class BackendChoice:
    """``requested`` by the config, ``actual`` as it will run; ``reason`` and ``remedy`` are for a fallback.

    ``xformers`` is on, off: <reason>, or not installed; None where Unsloth was not asked for or not tried.
    """

    requested: Backend
    actual: Backend
    reason: str | None = None
    remedy: str = ""
    xformers: str | None = None

    def facts(self) -> dict[str, Any]:
        """For the stamp."""
        facts = {"requested": self.requested, "actual": self.actual, "fallback_reason": self.reason}
        return facts if self.xformers is None else {**facts, "xformers": self.xformers}


def choose(config: "Config", model: Path, earlier: dict[str, Any] | None = None) -> BackendChoice:
    """``model`` is a local folder with at least config.json; ``earlier`` the backend facts of a run to be resumed.

    Raises ``MachineError`` where a fallback would be needed but is off.
    """
    if config.tuning.backend == "bitsandbytes":
        return BackendChoice("bitsandbytes", "bitsandbytes")
    # a restart after a failure of Unsloth hands its reason over, so that a second failure cannot loop
    reason, xformers = os.environ.pop(REASON_VARIABLE, None), os.environ.pop(XFORMERS_VARIABLE, None)
    if reason is None and earlier and earlier["actual"] == "bitsandbytes" and earlier["fallback_reason"]:
        # one run, one backend: what fell back once goes on so, even where Unsloth would work by now
        return fallen(config, earlier["fallback_reason"], "a new RUN tries Unsloth again", earlier.get("xformers"))
    if reason is not None:
        return fallen(config, reason, _BITSANDBYTES_HERE, xformers)
    found = unsloth_probe.verdict(config, model)
    if found.works:
        return BackendChoice("unsloth", "unsloth", xformers=found.xformers)
    return fallen(config, found.reason or "", remedy(found), found.xformers)


def remedy(found: Verdict) -> str:
    return _REMEDIES[found.kind]


def fallen(config: "Config", reason: str, remedy: str, xformers: str | None = None) -> BackendChoice:
    """bitsandbytes in Unsloth's place, or ``MachineError`` with tuning.fallback: never."""
    if config.tuning.fallback == "never":
        raise MachineError(f"Unsloth was asked for, but {reason}", f"{remedy}; or set tuning.fallback: auto")
    return BackendChoice("unsloth", "bitsandbytes", reason, remedy, xformers)


def restart_with_bitsandbytes(config: "Config", choice: BackendChoice, reason: str) -> NoReturn:
    """Replace this process, which Unsloth has patched, by a clean one that runs the same command."""
    fallen(config, reason, _BITSANDBYTES_HERE)
    os.environ[REASON_VARIABLE], os.environ[XFORMERS_VARIABLE] = reason, choice.xformers or ""
    sys.stdout.flush()
    sys.stderr.flush()
    words = [sys.executable, *sys.orig_argv[1:]]
    if os.name != "posix":  # there, exec starts a second process and ends this one, which make waits for
        raise SystemExit(subprocess.run(words).returncode)
    os.execv(sys.executable, words)
