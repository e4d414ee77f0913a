"""Download an adapter from the Hub: the files of the adapter only, from one commit."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

from huggingface_hub import constants

from ..errors import AdapterFileError, HubError
from ..files.format import CONFIG_NAME, EXTRAS_NAME, FULL_MODEL_FILES, LEGACY_WEIGHTS_NAME, WEIGHTS_NAME
from ..safe_io.atomic import replace_together
from ..safe_io.reading import MAX_JSON_BYTES, own_folder
from .names import (
    ADAPTER,
    CARD_NAME,
    MODULES,
    PICTURES,
    PROCESSING,
    check_repository,
    check_subfolder,
    chosen,
    files_below,
    inner_adapters,
    is_folder,
    is_ignored,
    why_no_source,
)
from .network import Repository
from .snapshot import Snapshot, fetch, in_cache, size_of


class FullModelError(AdapterFileError):
    """A repository holds a full model instead of an adapter."""


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
    """The folder of an adapter: `adapter` itself if it is a folder, else what `pull` downloads from the Hub.

    Raises:
        HubError: neither a folder nor a repository that could be reached; says why, and the next step.
        AdapterFileError: the repository holds no adapter, or `subfolder` is a link that points outside the folder.
    """
    name = os.fspath(adapter)
    if is_ignored(revision, name):
        raise HubError(f"{name!r} is a folder, which has no revisions. Omit revision={revision!r}.")
    if is_folder(name):
        return own_folder(Path(name), check_subfolder(subfolder, f"loading {name!r}"))
    reason = why_no_source(name)
    if reason is not None:
        raise HubError(f"{name!r} is not a local folder and not a valid repository name: {reason}.")
    return pull(
        name, revision=revision, token=token, subfolder=subfolder, cache_dir=cache_dir,
        local_files_only=local_files_only, endpoint=endpoint, call=f"{name!r} is not a local folder; downloading it",
    )  # fmt: skip


def pull(
    repo_id: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    endpoint: str | None = None,
    overwrite: bool = False,
    call: str | None = None,
) -> Path:
    """Download an adapter from the Hub.

    All files are of one commit, and their sizes and hashes are verified.

    Args:
        repo_id: such as `user/adapter`.
        folder: where to write the files and the card, all or none. It must be new or empty unless `overwrite`, which
            also removes the files of another adapter there. Default: the files stay in the cache, without the card.
        revision: branch, tag, commit or `refs/pr/1`. Default: `main`.
        subfolder: folder of an adapter that is not in the root of the repository.
        token: default: that of `hf auth login` or HF_TOKEN.
        cache_dir: default: that of huggingface_hub.
        local_files_only: use the cache and send no request, as with HF_HUB_OFFLINE.
        endpoint: URL of another Hub.
        call: how messages name this call. Default: by repository.

    Returns:
        `folder`, or the adapter's folder in the cache.

    Raises:
        HubError: no such repository, revision or access; no network; or a file differs from its hash on the Hub.
        AdapterFileError: the repository holds no adapter, or `folder` is not empty.
    """
    out = None if folder is None else Path(folder)
    if out is not None and out.exists() and not out.is_dir():
        raise AdapterFileError(f"{out} is a file. Name a folder.")
    if out is not None and out.is_dir() and any(out.iterdir()) and not overwrite:
        raise AdapterFileError(f"{out} is not empty. Name a new folder, or pass --overwrite (overwrite=True).")
    call = call or f"downloading {repo_id!r}"
    check_repository(repo_id, f"{call}: {repo_id!r} is")
    inside = check_subfolder(subfolder, call)
    repo = Repository(repo_id, revision, token, endpoint, call)
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    patterns = (*ADAPTER, *PROCESSING, *MODULES, *((CARD_NAME, PICTURES) if out is not None else ()))

    def download(snapshot: Snapshot) -> Path:
        _require(snapshot, inside)
        return snapshot.download(chosen(snapshot.files, patterns, inside))

    found = fetch(
        repo, cache, download, partial(_cached, repo, cache, inside), f"hf-lora pull {repo_id}", local_files_only
    )
    return found / inside if out is None else _copy(found / inside, out, patterns)


def _cached(repo: Repository, cache: Path, inside: str) -> Path | None:
    """The folder in the cache, if it holds a complete adapter.

    Raises:
        FullModelError: it holds a full model.
    """
    prefix = f"{inside}/" if inside else ""
    found = in_cache(repo, cache, prefix + CONFIG_NAME, prefix + "config.json")
    if found is not None and not (found / inside / CONFIG_NAME).is_file():
        raise FullModelError(f"{found / inside} holds a full model instead of an adapter.")
    return found if found is not None and (found / inside / WEIGHTS_NAME).is_file() else None


def _require(snapshot: Snapshot, inside: str) -> None:
    """Check that there is an adapter among the files.

    Raises:
        AdapterFileError: names what is there instead.
    """
    prefix, paths, repo_id = f"{inside}/" if inside else "", set(snapshot.files), snapshot.repo.repo_id
    where = f"{repo_id} at {snapshot.repo.revision or 'main'!r}" + (f", folder {inside!r}" if inside else "")
    if {prefix + CONFIG_NAME, prefix + WEIGHTS_NAME} <= paths:
        for name in (CONFIG_NAME, EXTRAS_NAME):
            if prefix + name in paths and size_of(snapshot.files[prefix + name]) > MAX_JSON_BYTES:
                raise AdapterFileError(
                    f"{where}: {name} is larger than {MAX_JSON_BYTES:,} bytes. It was not downloaded."
                )
        return
    if prefix + CONFIG_NAME in paths:
        if prefix + LEGACY_WEIGHTS_NAME in paths:
            raise AdapterFileError(
                f"{where} holds {LEGACY_WEIGHTS_NAME}, a pickle, which is not downloaded. Get it with `hf download "
                f"{repo_id} --local-dir FOLDER` and convert it once: hf-lora convert FOLDER --out NEW"
            )
        raise AdapterFileError(
            f"{where} has {CONFIG_NAME} but no {WEIGHTS_NAME}: the adapter is incomplete. Name another revision, or "
            "ask its author."
        )
    inner, full = inner_adapters(paths), [name for name in FULL_MODEL_FILES if prefix + name in paths]
    if inner:
        also = f"Its subfolders {', '.join(inner)} hold adapters: choose one with subfolder= (--subfolder)."
    elif full:
        also = f"It holds a full model ({', '.join(full)}): load it with transformers' from_pretrained."
    else:
        also = f"It holds {', '.join(sorted(paths)[:8]) or 'nothing'}. Check the name and the revision."
    kind = FullModelError if full and not inner else AdapterFileError
    raise kind(f"{where} is not an adapter (no {prefix}{CONFIG_NAME}). {also}")


def _copy(source: Path, out: Path, patterns: tuple[str, ...]) -> Path:
    """Copy an adapter's files into a folder, and remove the files of another adapter there."""
    names = chosen(files_below(source), patterns)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterFileError(f"{out} could not be created ({error}). Name another folder.") from error
    for name in names:
        if "/" in name:  # a tokenizer file; the adapter comes last
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, out / name)
    writers = {name: partial(shutil.copyfile, source / name) for name in sorted(names) if "/" not in name}
    left = set(chosen(files_below(out), (EXTRAS_NAME, *PROCESSING, *MODULES))) - set(names)
    if EXTRAS_NAME in left:  # emptied atomically with the other files, then removed
        replace_together(out, {**writers, EXTRAS_NAME: lambda place: place.write_text("{}")})
    else:
        replace_together(out, writers)
    for name in left:
        (out / name).unlink()
    return out
