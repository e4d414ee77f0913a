"""What a repository may be called, and which files of a folder or a repository belong to an adapter.

Nothing else is pushed or pulled.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..errors import HubError
from ..files.format import CONFIG_NAME, EXTRAS_NAME, WEIGHTS_NAME

ADAPTER = (CONFIG_NAME, WEIGHTS_NAME, EXTRAS_NAME)
CARD_NAME = "README.md"
PICTURES = "*.png"
"""What the card shows."""
PROCESSING = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.jinja", "additional_chat_templates/*.jinja", "tokenizer.model", "spiece.model",
    "sentencepiece.*", "source.spm", "target.spm", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
"""Tokenizers and processors, where they lie beside the adapter."""


def is_folder(name: str) -> bool:
    """Whether it is one here; what the system cannot look for is none."""
    try:
        return Path(name).is_dir()
    except OSError:  # longer than a path may be
        return False


def check_repository(name: str, opening: str) -> None:
    """Refuse what no repository can be called.

    Args:
        opening: the beginning of the message.

    Raises:
        HubError: it is no name.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise HubError(f"{opening} no repository can have that name ({str(error).splitlines()[0]}).") from error


def chosen(paths: Iterable[str], patterns: Iterable[str], subfolder: str = "") -> list[str]:
    """The paths in `subfolder` (and no deeper than a pattern says) that match; they stay whole."""
    prefix = f"{subfolder}/" if subfolder else ""
    found = []
    for path in paths:
        inside = path.removeprefix(prefix)
        if path.startswith(prefix) and any(
            inside.count("/") == pattern.count("/") and fnmatch.fnmatchcase(inside, pattern) for pattern in patterns
        ):
            found.append(path)
    return found


def inner_adapters(paths: Iterable[str]) -> list[str]:
    """Folders of a repository, besides its root, that hold an adapter; checkpoints are none."""
    folders = {path.removesuffix(f"/{CONFIG_NAME}") for path in paths if path.endswith(f"/{CONFIG_NAME}")}
    return sorted(f for f in folders if not f.startswith(("checkpoint-", "last-checkpoint")))


def check_subfolder(subfolder: str | None, call: str) -> str:
    """A folder inside a repository, in its plain form; "" for the root.

    Raises:
        HubError: it leads out of the repository.
    """
    plain = (subfolder or "").strip("/")
    out = plain and any(part in ("", ".", "..") for part in plain.split("/"))
    if out or not plain.isprintable() or "\\" in plain or (subfolder or "").startswith("/"):
        raise HubError(f"{call}: subfolder={subfolder!r} is no folder inside a repository. Name one like 'mine'.")
    return plain
