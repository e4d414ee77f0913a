"""Valid names of repositories, and which files of a folder or a repository belong to an adapter.

Nothing else is pushed or downloaded.
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
"""Pictures that the card shows."""
PROCESSING = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.jinja", "additional_chat_templates/*.jinja", "tokenizer.model", "spiece.model",
    "sentencepiece.*", "source.spm", "target.spm", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
    "modules.json", "sentence_*_config.json", "config_sentence_transformers.json", "[0-9]*_*/config.json",
)  # fmt: skip
"""Files of tokenizers and processors, and of what sentence-transformers has around a model, such as `1_Pooling`."""


def is_folder(name: str) -> bool:
    """Whether it is a folder on this machine."""
    try:
        return Path(name).is_dir()
    except OSError:  # the path is too long
        return False


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
        raise HubError(f"{opening} not a valid repository name ({str(error).splitlines()[0]}).") from error


def check_subfolder(subfolder: str | None, call: str) -> str:
    """A normalized folder inside a repository; "" for the root.

    Raises:
        HubError: it points outside the repository.
    """
    plain = (subfolder or "").strip("/")
    out = plain and any(part in ("", ".", "..") for part in plain.split("/"))
    if out or not plain.isprintable() or "\\" in plain or (subfolder or "").startswith("/"):
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
