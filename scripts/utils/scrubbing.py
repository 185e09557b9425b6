"""Secrets out of texts that leave this machine: tokens, keys, passwords, credentials in addresses, names of people.

Two ways together. What this machine knows to be secret (its environment, .env, the hub's token file) is taken out
wherever it stands and however it is written; what only looks like a secret is taken out by its form. Better a word too
many than one too few: what is left must be fit for a public issue. Standard library only.
"""

import base64
import contextlib
import functools
import getpass
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scripts.utils import environment
from scripts.utils.files import REPO_ROOT

HIDDEN = "***"
_SHORTEST = 6  # letters of a secret: shorter ones stand in every text
SECRET_NAME = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSW(?:OR)?D|PASSPHRASE|(?:^|_)PASS(?:$|_)|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL|"
    r"COOKIE|WEBHOOK|(?:^|_)(?:KEY|PAT|DSN|AUTH)(?:$|_)",
    re.IGNORECASE,
)
# a token may stand right behind the last letter of an escape: %3D, \n, \u003d
_ESCAPE = r"(?<=%[0-9A-Fa-f]{2})|(?<=\\[nrt])|(?<=\\u[0-9A-Fa-f]{4})|(?<=\\x[0-9A-Fa-f]{2})"
TOKEN = re.compile(
    rf"(?:(?<![A-Za-z0-9])|{_ESCAPE})(?:"
    r"hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|"  # the model hub
    r"sk-[A-Za-z0-9_-]{16,}|gsk_[A-Za-z0-9]{16,}|AIza[A-Za-z0-9_-]{20,}|ya29\.[A-Za-z0-9_.-]{16,}|"
    r"gh[opsru]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}|glpat-[A-Za-z0-9_-]{16,}|npm_[A-Za-z0-9]{16,}|pypi-[A-Za-z0-9_-]{16,}|"
    r"xox[abeoprs]-[A-Za-z0-9-]{10,}|wandb_v\d_[A-Za-z0-9_]{16,}|dckr_pat_[A-Za-z0-9_-]{16,}|"
    r"(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{16}|"  # AWS
    r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?"  # a JSON web token
    r")"
)
# a wandb key is 40 hexadecimal digits; so is a git commit, which the bundle shortens before it comes here
_HEX_KEY = re.compile(rf"(?:(?<![0-9A-Fa-f])|{_ESCAPE})[0-9a-f]{{40}}(?![0-9A-Fa-f])")
_PRIVATE_KEY = re.compile(r"-----BEGIN[ A-Z]*PRIVATE KEY-----.*?(?:-----END[ A-Z]*PRIVATE KEY-----|\Z)", re.DOTALL)
# 40 letters of base64, as the secret half of an AWS key has it, where no name stands before it
_BASE64_KEY = re.compile(
    r"(?<![A-Za-z0-9/+])(?=[A-Za-z0-9/+]{0,39}[A-Z])(?=[A-Za-z0-9/+]{0,39}[a-z])(?=[A-Za-z0-9/+]{0,39}\d)[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])"
)
# scheme://user:password@host, also as JSON has it (\/) and as a part of another address (%3A%2F%2F)
_IN_ADDRESS = re.compile(r"((?::|%3a)(?:\\*/|%2f){2})[^\s/\"'<>\\]{1,500}(?:@|%40)", re.IGNORECASE)
# name=value, name: value, "name": "value", --name value
_NAMED = re.compile(
    rf"(?P<name>(?:(?<![A-Za-z])|{_ESCAPE})(?:token|secret|passw(?:or)?d|passphrase|pass|pwd|api[_-]?key|access[_-]?key|"
    r"private[_-]?key|credentials?|cookie|signature|sig|auth|authorization)(?![A-Za-z])[\w-]{0,40}"
    r"(?:\\*[\"'])?(?:\s*(?:=|:|%3d|%3a)\s*|(?<=[-\w])\s+(?=\S*\d))(?:\\*[\"'])?(?:(?:bearer|basic)\s+)?)"
    r"[^\s\"'&,;<>\\{}\[\]()]{6,}",
    re.IGNORECASE,
)
_BEARER = re.compile(
    r"\b(bearer(?:\s+|%20)|basic(?:\s+|%20)(?=[A-Za-z0-9+/=_-]{16}))[A-Za-z0-9+/_.=~-]{8,}", re.IGNORECASE
)
_HOME = re.compile(
    r"(?:[/\\]|%2f|%5c)+(?:home|users)(?:[/\\]|%2f|%5c)+(?:(?!%2f|%5c)[^/\\\s\"':,;<>|*?])+", re.IGNORECASE
)
_MAIL = re.compile(r"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+")
# names that everybody has, and that stand in every path
_ORDINARY = set(
    "root user users home ubuntu debian runner admin nobody localhost vscode docker python train test data dev app work models outputs scripts".split()
)


def known_secrets(root: Path = REPO_ROOT) -> list[str]:
    """Secret values that this machine holds, longest first: of the environment, .env, and the hub's token file."""
    named = {**environment.read_dotenv(root / ".env"), **os.environ}
    found = {value.strip() for name, value in named.items() if SECRET_NAME.search(name)}
    homes = [
        os.environ.get("HF_TOKEN_PATH"),
        os.path.join(os.environ.get("HF_HOME") or "~/.cache/huggingface", "token"),
    ]
    for path in (Path(name).expanduser() for name in homes if name):
        try:
            found.add(path.read_text(encoding="utf-8").strip())
        except (OSError, UnicodeDecodeError):
            continue
    return sorted((value for value in found if len(value) >= _SHORTEST), key=len, reverse=True)


def known_names() -> list[str]:
    """Names that tell whose machine this is: the user's, the home folder's, the machine's."""
    names = {Path.home().name, socket.gethostname(), socket.gethostname().partition(".")[0]}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container may have no name for its user
        names.add(getpass.getuser())
    return sorted((name for name in names if len(name) >= 3 and name.lower() not in _ORDINARY), key=len, reverse=True)


def scrub(text: str, secrets: Iterable[str] = (), names: Iterable[str] = ()) -> str:
    """``text`` without ``secrets`` (in any usual spelling), without what looks like one, and without ``names``."""
    for secret in secrets:
        text = _spellings(secret).sub(HIDDEN, text)
    text = _PRIVATE_KEY.sub(HIDDEN, text)
    text = _IN_ADDRESS.sub(rf"\g<1>{HIDDEN}@", text)
    text = TOKEN.sub(HIDDEN, text)
    text = _HEX_KEY.sub(HIDDEN, text)
    text = _BEARER.sub(rf"\g<1>{HIDDEN}", text)
    text = _NAMED.sub(rf"\g<name>{HIDDEN}", text)
    text = _BASE64_KEY.sub(HIDDEN, text)
    text = _HOME.sub("~", text)
    text = _MAIL.sub(f"{HIDDEN}@{HIDDEN}", text)
    for name in names:
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", HIDDEN, text, flags=re.IGNORECASE)
    return text


def clean(value: Any, secrets: Iterable[str], names: Iterable[str] = ()) -> Any:
    """A JSON value whose texts are scrubbed, keys too; what stands under a secret's name is taken out whole."""
    secrets, names = list(secrets), list(names)

    def cleaned(item: Any) -> Any:
        if isinstance(item, dict):
            return {
                scrub(str(key), secrets, names): HIDDEN
                if isinstance(inner, str) and SECRET_NAME.search(str(key)) and not _is_setting(inner)
                else cleaned(inner)
                for key, inner in item.items()
            }
        if isinstance(item, list | tuple):
            return [cleaned(inner) for inner in item]
        return scrub(item, secrets, names) if isinstance(item, str) else item

    return cleaned(value)


def _is_setting(text: str) -> bool:
    """Short words under a name such as pad_token: a control token or a switch."""
    return len(text) < _SHORTEST or (text.startswith("<") and text.endswith(">") and len(text) < 40)


@functools.lru_cache(256)
def _spellings(secret: str) -> re.Pattern[str]:
    """The secret letter by letter: as it is, escaped as in JSON, HTML or an address, or all of it in base64."""
    letters = "".join(_spelling(letter) for letter in secret)
    packed = base64.b64encode(secret.encode()).decode().rstrip("=")
    packed = re.escape(packed).replace(r"\+", "[+-]").replace("/", "[/_]")  # that of addresses too
    return re.compile(f"(?:{letters}|{packed}=*)")


@functools.cache
def _spelling(letter: str) -> str:
    ways = [r"\\*" + re.escape(letter)] if letter in "\"'/\\$`" else [re.escape(letter)]
    octets = "".join(f"%{byte:02x}" for byte in letter.encode("utf-8", "surrogatepass"))
    ways.append(f"(?i:{octets})")
    ways.append(f"(?i:%25{octets[1:].replace('%', '%25')})")  # quoted twice
    units = letter.encode("utf-16-be", "surrogatepass")
    ways.append("(?i:" + "".join(rf"\\+u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2)) + ")")
    ways.append(
        rf"(?i:\\+U{ord(letter):08x}" + (rf"|\\+x{ord(letter):02x}" if ord(letter) < 256 else "") + ")"
    )  # Python's
    ways.append(f"(?i:&#(?:{ord(letter)}|x0*{ord(letter):x});)")
    ways += [re.escape(name) for name in _HTML.get(letter, ())]
    if letter == " ":
        ways.append(r"\+")
    if letter in "\n\r\t":
        ways.append(r"\\+" + {"\n": "n", "\r": "r", "\t": "t"}[letter])
    return f"(?:{'|'.join(ways)})"


_HTML = {"&": ("&amp;",), "<": ("&lt;",), ">": ("&gt;",), '"': ("&quot;",), "'": ("&#39;", "&apos;")}
