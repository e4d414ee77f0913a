"""Bring an adapter from the Hub: one commit, and the adapter's files alone. See `place.py` for the way there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from ..errors import AdapterFileError
from ..files.format import CONFIG_NAME, EXTRAS_NAME, FULL_MODEL_FILES, LEGACY_WEIGHTS_NAME, WEIGHTS_NAME
from ..safe_io.atomic import replace_together
from ..safe_io.reading import MAX_JSON_BYTES, own_folder
from .names import (
    ADAPTER,
    CARD_NAME,
    PICTURES,
    PROCESSING,
    check_repository,
    check_subfolder,
    chosen,
    inner_adapters,
    is_folder,
)
from .place import Listing, Place, size_of


class FullModelError(AdapterFileError):
    """A repository holds a full model where an adapter was looked for."""


def local_adapter(
    adapter: str | os.PathLike[str],
    revision: str | None = None,
    token: str | bool | None = None,
    *,
    subfolder: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    endpoint: str | None = None,
) -> Path:
    """The folder of an adapter: itself where it is one, else what `fetch_adapter` brings from the Hub.

    Raises:
        HubError: neither a folder nor a repository that can be reached; says why, and the next step.
        AdapterFileError: the repository holds no adapter, or `subfolder` is a link that leads out of the folder.
    """
    name = os.fspath(adapter)
    if is_folder(name):
        return own_folder(Path(name), check_subfolder(subfolder, f"loading {name!r}"))
    return fetch_adapter(
        name, revision=revision, token=token, subfolder=subfolder, cache_dir=cache_dir,
        local_files_only=local_files_only, endpoint=endpoint,
    )  # fmt: skip


def pull_adapter(
    repo_id: str,
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    endpoint: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Put an adapter from the Hub, with its card, into a folder; all files or none.

    Args:
        folder: new or empty, unless `overwrite`; what another adapter left there of its own then goes away.
        revision, subfolder, token, cache_dir, local_files_only, endpoint: see `fetch_adapter`.

    Raises:
        HubError: the repository cannot be reached or read.
        AdapterFileError: it holds no adapter, or the folder is not empty.
    """
    out = Path(folder)
    if out.exists() and not out.is_dir():
        raise AdapterFileError(f"{out} is a file. Name a folder.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise AdapterFileError(f"{out} is not empty. Name a new folder, or pass --overwrite (overwrite=True).")
    source = fetch_adapter(
        repo_id, revision=revision, token=token, subfolder=subfolder, cache_dir=cache_dir, card=True,
        local_files_only=local_files_only, endpoint=endpoint,
    )  # fmt: skip
    patterns = (*ADAPTER, *PROCESSING, CARD_NAME, PICTURES)
    paths = (p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file())
    names = chosen(paths, patterns)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterFileError(f"{out} cannot be made ({error}). Name another folder.") from error
    for name in names:
        if "/" in name:  # of a tokenizer; the adapter comes last
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, out / name)
    writers = {name: _copier(source / name) for name in sorted(names) if "/" not in name}
    there = (p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() or p.is_symlink())
    left = set(chosen(there, (EXTRAS_NAME, *PROCESSING))) - set(names)  # of another adapter, which was here before
    if EXTRAS_NAME in left:
        writers[EXTRAS_NAME] = lambda place: place.write_text("{}")  # in the same moment as the rest
    replace_together(out, writers)
    for name in left:
        (out / name).unlink()
    return out


def _copier(source: Path) -> Callable[[Path], Any]:
    return lambda target: shutil.copyfile(source, target)


def fetch_adapter(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    endpoint: str | None = None,
    card: bool = False,
) -> Path:
    """Bring an adapter's files into the cache; the folder where they lie.

    Args:
        repo_id: such as `user/adapter`.
        revision: branch, tag, commit or `refs/pr/1`; None: `main`. It is resolved once; all files are of that
            commit.
        token: None: the one of `hf auth login` or HF_TOKEN.
        subfolder: of an adapter that does not lie in the repository's root.
        cache_dir: None: the client's own.
        local_files_only: take them from the cache and ask nothing. HF_HUB_OFFLINE does the same.
        endpoint: of another Hub.
        card: bring README.md and the pictures too.

    Raises:
        HubError: no such repository, revision or access; no network; or what came is not what the Hub says it is.
        AdapterFileError: the repository holds no adapter.
    """
    call = f"pulling {repo_id!r}"
    check_repository(repo_id, f"{repo_id!r} is no folder here, and")
    inside = check_subfolder(subfolder, call)
    place = Place(
        repo_id, revision or "main", token, endpoint, Path(cache_dir or constants.HF_HUB_CACHE).expanduser(), call,
        lambda folder: _is_adapter(folder / inside),
        f"hf-lora pull {repo_id}",
    )  # fmt: skip
    patterns = (*ADAPTER, *PROCESSING, *((CARD_NAME, PICTURES) if card else ()))

    def needed(listing: Listing) -> list[str]:
        _require(place, inside, listing)
        return chosen(listing.files, patterns, inside)

    return place.fetch(needed, local_files_only) / inside


def _is_adapter(folder: Path) -> bool:
    """Whether a folder of the cache holds a whole adapter.

    Raises:
        FullModelError: it holds a full model.
    """
    if not (folder / CONFIG_NAME).is_file() and (folder / "config.json").is_file():
        raise FullModelError(f"{folder} holds a full model, and no adapter.")
    return all((folder / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME))


def _require(place: Place, inside: str, listing: Listing) -> None:
    """See that an adapter is among the files.

    Raises:
        AdapterFileError: says what is there instead.
    """
    prefix, paths, repo_id = f"{inside}/" if inside else "", set(listing.files), place.repo_id
    where = f"{repo_id} at {place.revision!r}" + (f", folder {inside!r}" if inside else "")
    if {prefix + CONFIG_NAME, prefix + WEIGHTS_NAME} <= paths:
        for name in (CONFIG_NAME, EXTRAS_NAME):
            if prefix + name in paths and size_of(listing.files[prefix + name]) > MAX_JSON_BYTES:
                raise AdapterFileError(f"{where}: {name} has more than {MAX_JSON_BYTES:,} bytes. It is not fetched.")
        return
    if prefix + CONFIG_NAME in paths:
        if prefix + LEGACY_WEIGHTS_NAME in paths:
            raise AdapterFileError(
                f"{where} holds {LEGACY_WEIGHTS_NAME}, a pickle, which is not fetched. Bring it with `hf download "
                f"{repo_id} --local-dir FOLDER` and convert it once: hf-lora convert FOLDER --out NEW"
            )
        raise AdapterFileError(
            f"{where} holds {CONFIG_NAME} and no {WEIGHTS_NAME}: the adapter is incomplete. Ask its author, or "
            "name another revision."
        )
    inner = inner_adapters(paths)
    full = [name for name in FULL_MODEL_FILES if prefix + name in paths]
    if inner:
        also = f"It holds the adapters {', '.join(inner)} in folders of their own: pass subfolder= (--subfolder)."
    elif full:
        also = f"It holds a full model ({', '.join(full)}): load that with transformers' from_pretrained."
    else:
        also = f"It holds {', '.join(sorted(paths)[:8]) or 'nothing'}. Check the name and the revision."
    kind = FullModelError if full and not inner else AdapterFileError
    raise kind(f"{where} is no adapter (no {prefix}{CONFIG_NAME}). {also}")
