"""Download the files of a base model from the Hub without loading it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from huggingface_hub import constants

from ..config import LoraConfig
from ..file_merge.ranges import INDEX_NAME, SINGLE_NAME
from ..files.format import read_config, read_extras
from .names import check_repository, chosen, is_folder
from .network import Repository
from .snapshot import Snapshot, fetch, in_cache

SMALL_FILES = (
    "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "LICENSE*", "NOTICE*",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
"""Downloaded in addition to the weights. Other folders in a repository hold other formats of the model."""


def local_base(
    base: str | os.PathLike[str],
    revision: str | None = None,
    token: str | bool | None = None,
    *,
    adapter: Path | None = None,
) -> Path:
    """The folder of a base model: `base` itself if it is a folder, else its files downloaded from the Hub.

    Args:
        revision: branch, tag or commit. Default: the commit that `adapter` was trained on, else `main`.
        adapter: the folder of an adapter of this base.

    Raises:
        HubError: neither a folder nor a repository that could be reached.
        AdapterFileError: the adapter could not be read.
    """
    name = os.fspath(base)
    if is_folder(name):
        return Path(name)
    call = f"{name!r} is not a local folder; downloading the base {name!r}"
    check_repository(name, f"{call}: {name!r} is")
    if revision is None and adapter is not None:
        revision = commit_in_training(read_config(adapter), read_extras(adapter), name)
    repo = Repository(name, revision, token, None, call)
    cache = Path(constants.HF_HUB_CACHE)
    return fetch(repo, cache, _download, partial(_cached, repo, cache), f"hf download {name}")


def commit_in_training(config: LoraConfig, extras: Mapping[str, object], name: str) -> str | None:
    """The commit of base `name` that the adapter was trained on; None if it was another base or is not recorded."""
    recorded = extras.get("base")
    if isinstance(recorded, dict) and recorded.get("name") == name and isinstance(recorded.get("commit"), str):
        return str(recorded["commit"])
    return config.revision if config.base_model_name_or_path == name else None


def _download(snapshot: Snapshot) -> Path:
    weights = [SINGLE_NAME]
    if INDEX_NAME in snapshot.files:
        weights = _shards(snapshot.download([INDEX_NAME], trusting=True) / INDEX_NAME)
    names = [*chosen(snapshot.files, SMALL_FILES), *(name for name in weights if name in snapshot.files)]
    return snapshot.download(names, trusting=True)


def _cached(repo: Repository, cache: Path) -> Path | None:
    found = in_cache(repo, cache, "config.json")
    if found is None:
        return None
    index = found / INDEX_NAME
    weights = _shards(index) if index.is_file() else [SINGLE_NAME]
    return found if all((found / name).is_file() for name in weights) else None


def _shards(index: Path) -> list[str]:
    """The files that an index names; none if it cannot be read, which the merge then reports."""
    try:
        return sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
