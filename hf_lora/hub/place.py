"""A repository on the Hub and in the client's cache: one commit, and each file compared with what the Hub says of it.

Files lie in the client's cache, as everything from the Hub does, and are read from there where there is no network.
What does not have the size and the hash that the Hub gives is not kept.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import RevisionNotFoundError
from transformers.utils import logging

from ..errors import HubError
from .network import cause, explain, never_arrived, retried, status_of

logger = logging.get_logger(__name__)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass
class Listing:
    """A repository at one commit: path -> what the Hub says of the file."""

    commit: str
    files: dict[str, Any] = field(default_factory=dict)


@dataclass
class Place:
    """A repository at a revision, on the Hub and in the cache.

    Attributes:
        call: what is being done, for messages.
        whole: whether the folder of a commit in the cache holds all that is wanted.
        once: the command that brings it, for messages.
        trusting: take a file that the cache has at its full size as it is, without computing its hash.
    """

    repo_id: str
    revision: str
    token: str | bool | None
    endpoint: str | None
    cache: Path
    call: str
    whole: Callable[[Path], bool] = Path.is_dir
    once: str = ""
    trusting: bool = False

    @property
    def storage(self) -> Path:
        """The repository's folder in the cache: its layout is documented, and the client's functions use it."""
        return self.cache / f"models--{self.repo_id.replace('/', '--')}"

    def folder(self, commit: str) -> Path:
        return self.storage / "snapshots" / commit

    def fetch(self, needed: Callable[[Listing], list[str]], local_files_only: bool = False) -> Path:
        """Bring files into the cache; the folder of their commit there.

        Args:
            needed: the paths to bring, of all that there are.
            local_files_only: take them from the cache and ask nothing. HF_HUB_OFFLINE does the same.

        Raises:
            HubError: they cannot be had.
        """
        if local_files_only or constants.is_offline_mode():
            return self.cached("the network was not asked (HF_HUB_OFFLINE or local_files_only)")
        try:
            listing = retried(self.call, self.listing, token=self.token)
        except Exception as error:
            silent = never_arrived(error) or (status_of(error) or 0) >= 500
            if silent and self.in_cache() is not None:
                found = self.cached("")
                logger.warning(f"{self.call}: the Hub does not answer; it is taken from the cache, {found.name}.")
                return found
            raise self.explained(error) from cause(error, self.token)
        for name in needed(listing):
            self.bring(listing, name)
        self.note(listing.commit)
        return self.folder(listing.commit)

    # From the Hub ----------------------------------------------------------------------------------------------------

    def listing(self) -> Listing:
        """Resolve the revision, and list the files of that commit."""
        api = HfApi(endpoint=self.endpoint, token=self.token)
        commit = api.model_info(self.repo_id, revision=self.revision).sha
        if commit is None or not _COMMIT.fullmatch(commit):
            raise ValueError(f"{commit!r} is no commit")
        tree = api.list_repo_tree(self.repo_id, revision=commit, recursive=True)
        return Listing(commit, {item.path: item for item in tree if hasattr(item, "blob_id")})

    def bring(self, listing: Listing, name: str) -> Path:
        """One file, whole; a second time where it is not what it should be."""
        said = listing.files[name]
        path = self.folder(listing.commit) / name
        if self.trusting and path.is_file() and path.stat().st_size == size_of(said):
            return path
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
            f"{self.call}: {name} arrived three times with other content than the Hub says it has ({size_of(said)} "
            "bytes). Nothing was kept. Try again; if it stays so, something on the way changes files."
        )

    def _download(self, listing: Listing, name: str, again: bool) -> Path:
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

    def commit_in_cache(self) -> str | None:
        """The commit that the revision was, when the cache last heard of it."""
        ref = self.ref()
        commit = self.revision
        if ref is not None:
            commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else ""
        return commit if _COMMIT.fullmatch(commit) else None

    def in_cache(self) -> str | None:
        """The commit that the cache has for the revision, with all that is wanted."""
        commit = self.commit_in_cache()
        return commit if commit and self.whole(self.folder(commit)) else None

    def cached(self, why: str) -> Path:
        """The folder in the cache.

        Raises:
            HubError: it is not there.
        """
        commit = self.in_cache()
        if commit is None:
            raise HubError(
                f"{self.repo_id!r} is no folder here. {self.call}: {why}, and the cache {self.cache} does not "
                f"hold it at {self.revision!r}. Pull it once with a network: {self.once}"
            )
        return self.folder(commit)


def size_of(said: Any) -> int:
    """The bytes of a file, as the Hub has it."""
    return int(said.lfs.size if said.lfs else said.size)


def _is(path: Path, said: Any) -> bool:
    """Whether a file has the size and the hash that the Hub gives: of the content, or of git's object."""
    size = path.stat().st_size
    if size != size_of(said):
        return False
    if said.lfs:
        digest, wanted = hashlib.sha256(), said.lfs.sha256
    else:
        digest, wanted = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), said.blob_id
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return bool(digest.hexdigest() == wanted)
