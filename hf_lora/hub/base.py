"""Bring a base model's files from the Hub, as they are: nothing is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import snapshot_download

from .network import explain, retried

FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "LICENSE*", "NOTICE*"]
"""Those of a model in safetensors files. Folders inside a repository hold other forms of it."""


def local_base(base: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder of a base model: itself where it is one, else a snapshot of the Hub's repository.

    Raises:
        HubError: neither a folder nor a repository that can be reached.
    """
    path, name = Path(base), str(base)
    if path.is_dir():
        return path
    call = f"pulling the base {name!r}"
    try:
        return Path(
            retried(
                call,
                lambda: snapshot_download(
                    name, revision=revision, token=token, allow_patterns=FILES, ignore_patterns=["*/*"]
                ),
                token=token,
            )
        )
    except Exception as error:  # the client's errors are of many classes
        raise explain(error, call, name, revision=revision, token=token) from error
