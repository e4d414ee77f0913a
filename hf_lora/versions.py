"""The versions of other libraries: what is needed, what is installed, and one error if they do not fit."""

from __future__ import annotations

import functools
import re

from .errors import Faults, VersionError

NEEDED: dict[str, tuple[str, str | None]] = {
    "torch": ("2.11", None),
    "transformers": ("5.17", "6"),
    "accelerate": ("1.10.1", None),
    "safetensors": ("0.8", None),
    "huggingface_hub": ("1.31", "3"),
}
"""Package -> the lowest version that works, and the first that may not (pyproject.toml has the same)."""


def installed(name: str) -> str | None:
    """The installed version of a package, or None."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def check_versions() -> None:
    """Check the installed versions, once.

    Raises:
        VersionError: lists every package that is missing, too old or too new.
    """
    faults = Faults("hf_lora cannot run with the installed packages")
    wrong = []
    for name, (low, high) in NEEDED.items():
        found = installed(name)
        wanted = f"{name}>={low}" + (f",<{high}" if high else "")
        if found is None:
            faults.add(f"{name} is not installed; {wanted} is needed")
        elif _numbers(found) < _numbers(low) or (high is not None and _numbers(found) >= _numbers(high)):
            faults.add(f"{name} {found} is installed; {wanted} is needed")
        else:
            continue
        wrong.append(f'"{wanted}"')
    faults.check(VersionError, f"Run: pip install -U {' '.join(wrong)}")


def is_older(name: str, version: str) -> bool:
    """Whether a package is installed in a version before this one."""
    found = installed(name)
    return found is not None and _numbers(found) < _numbers(version)


def why_missing(error: ImportError) -> str | None:
    """What to install for an error by which transformers says that a class needs a package; None for other errors."""
    found = re.search(r"requires the ([\w-]+) library", str(error))
    if found is None:
        return None
    package = {"pil": "pillow"}.get(found[1].lower(), found[1].lower())
    return f"it needs {package}, which is not installed. Run: pip install {package}"


def _numbers(version: str) -> list[int]:
    """The release of a version: 2.11.0+cpu -> [2, 11], without zeros at the end."""
    release = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in release[0].split(".")] if release else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers
