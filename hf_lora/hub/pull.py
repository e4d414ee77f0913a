"""Bring an adapter from the Hub: one commit, the adapter's files alone, each compared with what the Hub says of it.

Files lie in the client's cache, as everything from the Hub does, and are read from there where there is no network.
What does not have the size and the hash that the Hub gives is not kept.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers.utils import logging

from ..errors import AdapterFileError, HubError
from ..files.format import CONFIG_NAME, FULL_MODEL_FILES, LEGACY_WEIGHTS_NAME, WEIGHTS_NAME
from ..files.together import replace_together
from .names import ADAPTER, CARD_NAME, PICTURES, PROCESSING, check_subfolder, chosen, inner_adapters
from .network import cause, explain, never_arrived, retried, status_of

logger = logging.get_logger(__name__)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass
class _Listing:
    """A repository at one commit: path -> what the Hub says of the file."""

    commit: str
    files: dict[str, Any] = field(default_factory=dict)


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
        AdapterFileError: the repository holds no adapter.
    """
    path = Path(adapter)
    if path.is_dir():
        return path / check_subfolder(subfolder, f"loading {str(adapter)!r}")
    return fetch_adapter(
        str(adapter), revision=revision, token=token, subfolder=subfolder, cache_dir=cache_dir,
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
        folder: new or empty, unless `overwrite`.
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
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        if "/" in name:  # of a tokenizer; the adapter comes last
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, out / name)
    replace_together(out, {name: _copier(source / name) for name in sorted(names) if "/" not in name})
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
    try:
        validate_repo_id(repo_id)
        if repo_id.startswith((".", "/")) or repo_id.count("/") > 1:
            raise HFValidationError("a repository's name is like user/adapter")
    except HFValidationError as error:
        raise HubError(
            f"{repo_id!r} is no folder here, and no repository can have that name ({str(error).splitlines()[0]})."
        ) from error
    inside = check_subfolder(subfolder, call)
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    place = _Place(repo_id, revision or "main", inside, cache, token, endpoint, call)
    if local_files_only or constants.is_offline_mode():
        return place.cached("the network was not asked (HF_HUB_OFFLINE or local_files_only)")
    try:
        listing = retried(call, place.listing, token=token)
    except Exception as error:
        silent = never_arrived(error) or (status_of(error) or 0) >= 500
        if silent and place.in_cache() is not None:
            found = place.cached("")
            logger.warning(f"{call}: the Hub does not answer; the adapter is taken from the cache, {found.name}.")
            return found
        raise place.explained(error) from cause(error, token)
    names = place.needed(listing, card)
    for name in names:
        place.bring(listing, name)
    place.note(listing.commit)
    return place.folder(listing.commit)


@dataclass
class _Place:
    """An adapter on the Hub and in the cache."""

    repo_id: str
    revision: str
    inside: str
    cache: Path
    token: str | bool | None
    endpoint: str | None
    call: str

    @property
    def storage(self) -> Path:
        """The repository's folder in the cache: its layout is documented, and the client's functions use it."""
        return self.cache / f"models--{self.repo_id.replace('/', '--')}"

    def folder(self, commit: str) -> Path:
        return self.storage / "snapshots" / commit / self.inside

    # From the Hub ----------------------------------------------------------------------------------------------------

    def listing(self) -> _Listing:
        """Resolve the revision, and list the files of that commit."""
        api = HfApi(endpoint=self.endpoint, token=self.token)
        commit = api.model_info(self.repo_id, revision=self.revision).sha
        if commit is None or not _COMMIT.fullmatch(commit):
            raise ValueError(f"{commit!r} is no commit")
        tree = api.list_repo_tree(self.repo_id, revision=commit, recursive=True)
        return _Listing(commit, {item.path: item for item in tree if hasattr(item, "blob_id")})

    def needed(self, listing: _Listing, card: bool) -> list[str]:
        """The paths to bring.

        Raises:
            AdapterFileError: what is there is no adapter.
        """
        found = chosen(listing.files, (*ADAPTER, *PROCESSING, *((CARD_NAME, PICTURES) if card else ())), self.inside)
        self.require(set(listing.files))
        return found

    def require(self, paths: set[str]) -> None:
        """See that an adapter is among the paths.

        Raises:
            AdapterFileError: says what is there instead.
        """
        prefix = f"{self.inside}/" if self.inside else ""
        where = f"{self.repo_id} at {self.revision!r}" + (f", folder {self.inside!r}" if self.inside else "")
        if {prefix + CONFIG_NAME, prefix + WEIGHTS_NAME} <= paths:
            return
        if prefix + CONFIG_NAME in paths:
            if prefix + LEGACY_WEIGHTS_NAME in paths:
                raise AdapterFileError(
                    f"{where} holds {LEGACY_WEIGHTS_NAME}, a pickle, which is not fetched. Bring it with `hf download "
                    f"{self.repo_id} --local-dir FOLDER` and convert it once: hf-lora convert FOLDER --out NEW"
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
        raise AdapterFileError(f"{where} is no adapter (no {prefix}{CONFIG_NAME}). {also}")

    def bring(self, listing: _Listing, name: str) -> Path:
        """One file, whole; a second time where it is not what it should be."""
        said = listing.files[name]

        again = False
        for _ in range(3):
            try:
                path = retried(f"{self.call}, {name}", partial(self._download, listing, name, again), token=self.token)
            except Exception as error:
                raise self.explained(error, name) from cause(error, self.token)
            if _is(path, said):
                return path
            again = True
            path.resolve().unlink(missing_ok=True)  # nobody else shall take it for the file
            path.unlink(missing_ok=True)
        raise HubError(
            f"{self.call}: {name} arrived three times with other content than the Hub says it has "
            f"({said.size} bytes). Nothing was kept. Try again; if it stays so, something on the way changes files."
        )

    def _download(self, listing: _Listing, name: str, again: bool) -> Path:
        return Path(
            hf_hub_download(
                self.repo_id, name, revision=listing.commit, token=self.token, cache_dir=self.cache,
                endpoint=self.endpoint, force_download=again,
            )
        )  # fmt: skip

    def note(self, commit: str) -> None:
        """Remember which commit the revision is, for the time without a network; written when all files are there."""
        ref = self.ref()
        if ref is None or (ref.is_file() and ref.read_text(encoding="utf-8") == commit):
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        aside = ref.with_name(f".{ref.name}.{os.getpid()}.tmp")
        aside.write_text(commit, encoding="utf-8")
        aside.replace(ref)

    def ref(self) -> Path | None:
        """The file in which the cache keeps the commit of a branch or tag; None for a commit itself."""
        named = not _COMMIT.fullmatch(self.revision) and ".." not in self.revision.split("/")
        return self.storage / "refs" / self.revision.lstrip("/") if named else None

    def explained(self, error: Exception, name: str = "") -> HubError:
        here = f"{self.repo_id!r} is no folder here. " if not name else ""
        call = f"{here}{self.call}{f', {name}' if name else ''}"
        then = ""
        if isinstance(error, RevisionNotFoundError):
            then = self.revisions()
        return explain(
            error, call, self.repo_id, revision=self.revision, token=self.token, endpoint=self.endpoint, then=then
        )

    def revisions(self) -> str:
        """The names that a revision may have."""
        try:
            refs = HfApi(endpoint=self.endpoint, token=self.token).list_repo_refs(self.repo_id)
        except Exception:
            return "Check the name."
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
        return f"It has {', '.join(names[:20])}."

    # From the cache --------------------------------------------------------------------------------------------------

    def in_cache(self) -> str | None:
        """The commit that the cache has for the revision, with a whole adapter."""
        ref = self.ref()
        commit = self.revision
        if ref is not None:
            commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else ""
        whole = all((self.folder(commit) / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME))
        return commit if _COMMIT.fullmatch(commit) and whole else None

    def cached(self, why: str) -> Path:
        """The folder in the cache.

        Raises:
            HubError: it is not there.
        """
        commit = self.in_cache()
        if commit is None:
            raise HubError(
                f"{self.repo_id!r} is no folder here. {self.call}: {why}, and the cache {self.cache} does not "
                f"hold it at {self.revision!r}. Pull it once with a network: hf-lora pull {self.repo_id}"
            )
        return self.folder(commit)


def _is(path: Path, said: Any) -> bool:
    """Whether a file has the size and the hash that the Hub gives: of the content, or of git's object."""
    size = path.stat().st_size
    if size != (said.lfs.size if said.lfs else said.size):
        return False
    if said.lfs:
        digest, wanted = hashlib.sha256(), said.lfs.sha256
    else:
        digest, wanted = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), said.blob_id
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == wanted
