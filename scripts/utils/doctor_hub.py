"""The doctor on the model hub: can it be reached, is there a token (never shown), and is the model on this disk already.

Standard library only, and a few seconds at most: without a network the name look-up alone may take half a minute.
"""

import contextlib
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.utils import doctor_machine, environment, model_store
from scripts.utils.errors import SFTError
from scripts.utils.files import REPO_ROOT
from scripts.utils.findings import Finding, fault, from_problem, ok, warning

if TYPE_CHECKING:
    from scripts.utils.schema import ModelSection

SECONDS = 4.0
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def address() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def why_offline() -> str:
    """The variable that forbids the network, or an empty text."""
    return next((name for name in _OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), "")


class Look:
    """One look at the hub, begun at once and asked for later; ``wait`` gives the reason why it failed, or an empty text."""

    def __init__(self) -> None:
        self._reason = f"no answer within {SECONDS:g} s"
        self._thread = threading.Thread(target=self._ask, daemon=True)  # a name look-up has no time limit of its own
        self._thread.start()

    def _ask(self) -> None:
        request = urllib.request.Request(address() + "/api/models?limit=1", headers={"User-Agent": "sft-play"})
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                answer.read(1)
            self._reason = ""
        except urllib.error.HTTPError as error:
            self._reason = "" if error.code < 500 else f"it answered {error.code}"
        except (OSError, ValueError) as error:
            self._reason = str(getattr(error, "reason", error) or type(error).__name__)

    def wait(self) -> str:
        self._thread.join(SECONDS)
        return self._reason


def model(config: "ModelSection", look: Look | None) -> Finding:
    """Whether the model can be had: from this disk, else from the hub."""
    name = config.name
    try:
        model_store.check(name)
    except SFTError as problem:
        return from_problem("hub", "model-unusable", problem)
    if model_store.present(name, config.revision, weights=True):
        if why := why_offline() or (look.wait() if look else ""):
            why = f"{why} is set" if why in _OFFLINE else f"{address()} cannot be reached: {why}"
            return ok("hub", f"{why}; nothing is missing, {name} is on this disk")
        return ok("hub", f"{address()} answers; {name} is on this disk")
    if name == model_store.EMBEDDED_NAME:
        return ok("hub", f"{name} is made from a package when it is first used (or now: make download-model)")
    why = why_offline()
    why = f"{why} is set" if why else look.wait() if look else ""
    if why:
        text = f"{name} is not on this disk, and {address()} cannot be reached: {why}"
        hint = f"make download-model MODEL={name} where there is a network, and copy .cache/models here; or MODEL={model_store.EMBEDDED_NAME}"
        return fault("hub", "model-missing", text, hint)
    return ok("hub", f"{address()} answers; {name} is fetched when it is first used (or now: make download-model)")


def token() -> Finding:
    """Whether there is a token for gated models, and whether others can read it. It is never shown."""
    dotenv = REPO_ROOT / ".env"
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    stored = Path(os.environ.get("HF_TOKEN_PATH") or home / "token").expanduser()
    in_file = environment.read_dotenv(dotenv)
    places = {name: os.environ[name] for name in _TOKENS if os.environ.get(name)}
    where = next((f"{name} in .env" if in_file.get(name) == value else name for name, value in places.items()), "")
    value = next(iter(places.values()), "")
    if not where:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            value = stored.read_text(encoding="utf-8").strip()
            where = str(stored) if value else ""
    if open_to_all := doctor_machine.readable_by_others([path for path in (dotenv, stored) if path.is_file()]):
        names = " ".join(f"'{path}'" for path in open_to_all)
        return warning(
            "token",
            "secrets-readable",
            f"{', '.join(map(str, open_to_all))}: every user here can read it",
            f"chmod 600 {names}",
        )
    if value and (not value.startswith(("hf_", "api_org_")) or len(value) < 20 or not value.isascii() or " " in value):
        text = f"{where} does not look like a token of the hub, which begins with hf_"
        return warning(
            "token", "token-odd", text, "copy it once more from the hub's settings, without quotes or spaces"
        )
    return ok("token", f"there is one ({where})" if where else "none; only gated and private models need one")
