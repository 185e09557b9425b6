"""The doctor on the packages: what is missing, what has another version than was tried, and torch's build.

Reads what is installed without importing any of it, so that a broken package cannot take the doctor down.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scripts.utils import hardware
from scripts.utils.findings import Finding, fault, ok, warning

STAMP = ".sft-play-installed"  # env/install.sh leaves it beside the packages
# the oldest driver for each generation of CUDA: within one, newer minor versions run on older drivers
# (NVIDIA's CUDA Compatibility guide, minor version compatibility)
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


def declared(root: Path) -> dict[str, Any]:
    import tomllib

    project: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project


def missing(root: Path) -> list[str]:
    """The packages of the base install that are not there."""
    return [
        name
        for name in map(_name, declared(root)["dependencies"])
        if installed(name) is None and not (name == "bitsandbytes" and sys.platform == "darwin")
    ]


def mend() -> str:
    """The command that brings the packages back; once installed, only FORCE looks at them again."""
    return "make install FORCE=1" if (Path(sys.prefix) / STAMP).exists() else "make install"


def asked_extras() -> list[str]:
    """The extras that were asked for, as env/install.sh noted them."""
    try:
        lines = (Path(sys.prefix) / STAMP).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    return lines[1].split() if len(lines) > 1 else []


def check(root: Path) -> Iterator[Finding]:
    if absent := missing(root):
        yield fault("packages", "package-missing", f"not installed: {', '.join(absent)}", mend())
        if installed("packaging") is None:
            return
    project = declared(root)
    extras = [name for name in asked_extras() if name in project["optional-dependencies"]]
    needed = [(text, "") for text in project["dependencies"]]
    needed += [(text, extra) for extra in extras for text in project["optional-dependencies"][extra]]
    without: dict[str, list[str]] = {}
    wrong = []
    for text, extra in needed:
        name, have, fits = _against(text)
        if have is None and extra and fits:
            without.setdefault(extra, []).append(name)
        elif have is not None and not fits:
            wrong.append(f"{name} {have} ({text.partition(';')[0].strip().removeprefix(name)} is needed)")
    for extra, names in without.items():
        text = f"not installed, though EXTRAS={extra} was asked for: {', '.join(names)}"
        yield warning("packages", "extra-missing", text, f"make install EXTRAS={extra} FORCE=1")
    if wrong:
        yield fault("packages", "package-version", f"versions that do not do: {', '.join(wrong)}", mend())
    other = other_versions(root)
    if other and not wrong:
        text = f"other versions than were tried: {', '.join(other)}"
        yield warning("packages", "package-untried", text, mend())
    elif not (absent or wrong or without):
        known = f"; extras: {', '.join(extras)}" if extras else ""
        yield ok("packages", f"all installed, in the versions of env/constraints.txt{known}")


def _against(text: str) -> tuple[str, str | None, bool]:
    """Name of a requirement, the version that is there, and whether it does; one that is not for this system always does."""
    from packaging.requirements import Requirement

    requirement = Requirement(text)
    if requirement.marker and not requirement.marker.evaluate():
        return requirement.name, "", True
    have = installed(requirement.name)
    return requirement.name, have, have is None or requirement.specifier.contains(have, prereleases=True)


def other_versions(root: Path) -> list[str]:
    return [
        f"{name} {have} (not {version})"
        for name, version in pinned_versions(root / "env" / "constraints.txt").items()
        # a local part (torch's +cpu) is the same version built otherwise
        if (have := installed(name)) and have.partition("+")[0] != version
    ]


def pinned_versions(path: Path) -> dict[str, str]:
    """Exact versions in a constraints file, by normalised name, for the Python and system that run now."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    versions: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                versions[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    return versions


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]


def installed(name: str) -> str | None:
    """The version of a package, or None; one whose records are damaged counts as missing."""
    try:
        return metadata.version(name) or None
    except (metadata.PackageNotFoundError, OSError, KeyError):
        return None


def torch_build() -> Iterator[Finding]:
    """Whether torch was built for the graphics card that is here, and the driver is new enough for it."""
    cuda = torch_cuda()
    if not shutil.which("nvidia-smi"):
        kind = f"built for CUDA {cuda}" if cuda else "built without CUDA"
        yield ok("torch", f"{installed('torch')}, {kind}; no NVIDIA card here")
        return
    lines = hardware.nvidia("name", "driver_version").splitlines()
    if not lines:
        text = "nvidia-smi is here but cannot talk to a card"
        hint = "run nvidia-smi and do what it says (after an update of the driver: reboot); in a container: --gpus all"
        yield warning("torch", "driver-broken", text, hint)
        return
    card, _, driver = lines[0].rpartition(", ")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        yield ok("torch", f"{installed('torch')}; {card} is hidden by CUDA_VISIBLE_DEVICES={hidden}")
        return
    if cuda is None:
        text = f"{installed('torch')} is built without CUDA, so {card} would not be used"
        yield fault(
            "torch",
            "torch-without-cuda",
            text,
            "make install (it takes the build for CUDA where nvidia-smi finds a card)",
        )
        return
    needed = _OLDEST_DRIVER.get(int(cuda.partition(".")[0]), 0)
    have = int(number[0]) if (number := re.match(r"\d+", driver.strip())) else needed
    if have < needed:
        text = f"{installed('torch')} is built for CUDA {cuda}, which needs driver {needed} or newer; {card} has {driver.strip()}"
        older = f"uv pip install --torch-backend auto 'torch=={(installed('torch') or '').partition('+')[0]}'"
        yield fault("torch", "driver-too-old", text, f"update the NVIDIA driver, or take a build for this one: {older}")
        return
    yield ok("torch", f"{installed('torch')}, built for CUDA {cuda}; {card}, driver {driver.strip()}")


def wants_cuda() -> bool:
    """Whether a card that works is here, is not hidden, and torch is built for it: then torch must find it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    return bool(torch_cuda() and not hidden and hardware.nvidia("name"))


def torch_cuda() -> str | None:
    """The version of CUDA that torch was built for, from its version.py, read as text; None without CUDA."""
    found = find_spec("torch")
    for folder in (found.submodule_search_locations or []) if found else []:
        try:
            text = (Path(folder) / "version.py").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        line = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, flags=re.MULTILINE)
        return line[1] if line else None
    return None
