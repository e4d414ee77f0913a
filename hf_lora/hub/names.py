"""Valid names of repositories, and which files of a folder or a repository belong to an adapter.

Nothing else is pushed or downloaded.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..errors import ConfigError, HubError, nearest
from ..files.format import CONFIG_NAME, EXTRAS_NAME, WEIGHTS_NAME
from ..safe_io.reading import is_one_line

ADAPTER = (CONFIG_NAME, WEIGHTS_NAME, EXTRAS_NAME)
CARD_NAME = "README.md"
PICTURES = "*.png"
"""Pictures that the card shows."""
PROCESSING = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.jinja", "additional_chat_templates/*.jinja", "tokenizer.model", "spiece.model",
    "sentencepiece.*", "source.spm", "target.spm", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
"""Files of tokenizers and processors."""
MODULES = (
    "modules.json", "sentence_*_config.json", "config_sentence_transformers.json", "[0-9]*_*/config.json",
    "[1-9]*_*/model.safetensors",
)  # fmt: skip
"""Files of what sentence-transformers has around a model, such as `1_Pooling`; a trained `2_Dense` has weights."""


def is_folder(name: str) -> bool:
    """Whether it is a folder on this machine."""
    try:
        return bool(name) and Path(name).is_dir()  # an empty path would be the working directory
    except OSError:  # the path is too long
        return False


def is_ignored(revision: str | None, name: str) -> bool:
    """Whether a revision has no effect, since the name is that of a folder. Scripts pass `main` for every name."""
    return revision not in (None, "main") and is_folder(name)


def why_no_source(name: str) -> str | None:
    """Why a name that is no folder is not the name of a repository either; None if it may be one."""
    if not name.strip():
        return "the name is empty. Pass a folder or a name on the Hub"
    if address := re.match(r"https?://[^/]+/([^/?#]+/[^/?#]+)", name):
        return f"this is an address. Pass the name of the repository: {address[1]}"
    if os.path.isfile(name):
        return "this is a file. Name the folder that it is in"
    if name.startswith("~"):
        return f"the shell did not expand ~. Write the whole path, {os.path.expanduser(name)}"
    if os.path.isabs(name) or name.startswith(".") or name.count("/") > 1 or "\\" in name:
        return f"there is no such folder{siblings(name)}"
    return None


def check_base(name: str, revision: str | None, call: str, given: bool = True) -> None:
    """Refuse the name of a base model that is empty though it was given, and a revision of a folder.

    Raises:
        ConfigError: says which.
    """
    if given and not name:
        raise ConfigError(f"{call}: base_model is empty. Pass a folder or a name on the Hub, or omit it.")
    if is_ignored(revision, name):
        raise ConfigError(f"{call}: base_revision={revision!r} has no effect, since {name} is a folder. Omit it.")


def siblings(name: str) -> str:
    """The folders beside a mistyped path with the nearest names, for a message."""
    parent, _, last = name.rstrip("/").rpartition("/")
    try:
        with os.scandir(parent or ("/" if name.startswith("/") else ".")) as entries:
            folders = [entry.name for entry in entries if entry.is_dir()]
    except (OSError, ValueError):
        return ""
    return nearest(last, folders)


def check_repository(name: str, opening: str) -> None:
    """Refuse an invalid repository name.

    Args:
        opening: the beginning of the message.

    Raises:
        HubError: the name is invalid.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        hint = "it is a folder on this machine" if is_folder(name) else why_no_source(name)
        why = hint or str(error).splitlines()[0].rstrip(".")
        raise HubError(f"{opening} not a valid repository name ({why}).") from error


def check_subfolder(subfolder: str | None, call: str) -> str:
    """A normalized folder inside a repository; "" for the root.

    Raises:
        HubError: it points outside the repository.
    """
    plain = (subfolder or "").strip("/")
    out = plain and any(part in ("", ".", "..") for part in plain.split("/"))
    if out or not is_one_line(plain) or "\\" in plain or (subfolder or "").startswith("/"):
        raise HubError(f"{call}: subfolder={subfolder!r} is not a folder inside a repository. Use one such as 'mine'.")
    return plain


def chosen(paths: Iterable[str], patterns: Iterable[str], subfolder: str = "") -> list[str]:
    """The paths in `subfolder` that match one of the patterns; `*` does not match `/`."""
    prefix = f"{subfolder}/" if subfolder else ""
    return [
        path
        for path in paths
        if path.startswith(prefix) and any(_matches(path.removeprefix(prefix), pattern) for pattern in patterns)
    ]


def _matches(path: str, pattern: str) -> bool:
    return path.count("/") == pattern.count("/") and fnmatch.fnmatchcase(path, pattern)


def files_below(folder: Path) -> list[str]:
    """The paths of all files below a folder, relative to it."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def inner_adapters(paths: Iterable[str]) -> list[str]:
    """Subfolders of a repository that hold an adapter, except checkpoints."""
    folders = {path.removesuffix(f"/{CONFIG_NAME}") for path in paths if path.endswith(f"/{CONFIG_NAME}")}
    return sorted(f for f in folders if not f.startswith(("checkpoint-", "last-checkpoint")))
