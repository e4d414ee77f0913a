"""Bring an adapter from the Hub: the network is touched in this room alone."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..errors import AdapterFileError
from ..files.format import CONFIG_NAME, EXTRAS_NAME, LEGACY_WEIGHTS_NAME, WEIGHTS_NAME

PATTERNS = [
    CONFIG_NAME,
    WEIGHTS_NAME,
    LEGACY_WEIGHTS_NAME,
    EXTRAS_NAME,
    "*token*",
    "*.jinja",
    "*processor_config.json",
]


def local_adapter(adapter: str | os.PathLike[str], revision: str | None = None, token: str | None = None) -> Path:
    """The folder of an adapter: itself where it is one, else a snapshot of the Hub's repository.

    Raises:
        AdapterFileError: neither a folder nor a repository that can be reached.
    """
    path = Path(adapter)
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(str(adapter), revision=revision, token=token, allow_patterns=PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, EntryNotFoundError, OSError) as error:
        raise AdapterFileError(
            f"{str(adapter)!r} is no folder here, and no adapter could be fetched from the Hub under that name "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the name, the revision and your access."
        ) from error
