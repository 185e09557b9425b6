"""Files of a run to the hub: an explicit list by name, nothing else; private unless asked otherwise; the token stays unseen."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import stamp
from scripts.utils.errors import MachineError, RefusedError, SFTError, UserError
from scripts.utils.model_hub import within

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SECONDS = 20  # for the first answer of the hub
_TOKENIZER = (
    r"tokenizer\.json|tokenizer\.model|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.json|vocab\.txt|"
    r"merges\.txt|chat_template\.jinja|generation_config\.json"
)
_WEIGHTS = r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|config\.json"
ALLOWED = {
    "adapter": re.compile(rf"adapter_config\.json|adapter_model\.safetensors|{_TOKENIZER}"),
    "full": re.compile(rf"{_WEIGHTS}|{_TOKENIZER}"),
    "merged": re.compile(rf"{_WEIGHTS}|{_TOKENIZER}"),
    "gguf": re.compile(r"[\w.+-]+\.gguf"),
}
_TEXT = {".json", ".jinja", ".txt", ".md"}


@dataclass(frozen=True)
class File:
    """``content``: a path on this disk, or the text itself."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def chosen(folder: Path, what: str) -> list[File]:
    """The files of ``folder`` that may be published; raises ``RefusedError`` where a text holds a secret or a user's name."""
    found = [File(p.name, p) for p in sorted(folder.iterdir()) if p.is_file() and ALLOWED[what].fullmatch(p.name)]
    for file in found:
        if isinstance(file.content, Path) and file.content.suffix in _TEXT:
            check_text(file.content.read_text(encoding="utf-8", errors="replace"), str(file.content))
    return found


def check_text(text: str, where: str) -> None:
    if stamp.without_secrets(text) != text:
        raise RefusedError(
            f"{where} holds a token, a password from the environment, or the path of your home folder: nothing is pushed",
            "take it out of that file",
        )


def check_repo(name: str) -> None:
    """Raises ``UserError`` unless ``name`` can be a repository: owner/name, or a name of your own."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"REPO={name} is no name of a repository: {str(error).splitlines()[0]}", "REPO=owner/name"
        ) from error


def push(repo: str, files: list[File], *, public: bool, message: str) -> str:
    """Make the repository where it is missing, commit the files in one commit, and return its address.

    Raises ``UserError`` (no token, no right), ``RefusedError`` (public where private was asked for) or ``MachineError``.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    ):
        raise MachineError(
            "the hub cannot be reached: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set",
            "unset it; DRY_RUN=1 needs no network",
        )
    if not get_token():
        raise UserError("there is no token for the hub", "put HF_TOKEN=… (with the right to write) into .env")
    disable_progress_bars()
    api = HfApi()
    try:
        within(SECONDS, api.whoami)
        url = api.create_repo(repo, private=not public, exist_ok=True)
        whole = url.repo_id
        if not public and not _is_private(api, whole):
            raise RefusedError(f"{whole} exists and is public", "another REPO, or PUBLIC=1 to publish it there")
        operations = [
            CommitOperationAdd(file.name, file.content if isinstance(file.content, bytes) else str(file.content))
            for file in files
        ]
        done = api.create_commit(whole, operations, commit_message=message)
        return str(done.repo_url)
    except SFTError:
        raise
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise _explained(repo, error) from error


def _is_private(api: "HfApi", repo: str) -> bool:
    return bool(api.repo_info(repo).private)


def _explained(repo: str, error: Exception) -> SFTError:
    from huggingface_hub.errors import HfHubHTTPError

    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None) if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return UserError("the hub does not know the token", "put a valid HF_TOKEN=… into .env")
    if status == 403:
        return UserError(
            f"the token has no right to write to {repo}",
            "make one with the right to write, or choose a REPO of your own",
        )
    if status is not None:
        return MachineError(
            f"{repo} cannot be pushed: the hub answered {status}", "try again later; what lies here is untouched"
        )
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    return MachineError(
        f"{repo} cannot be pushed: no network to the hub ({why})", "try again where there is one; DRY_RUN=1 needs none"
    )
