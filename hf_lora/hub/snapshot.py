"""A repository at one commit, in huggingface_hub's cache; the hash of each file is verified.

`snapshot_download` does not verify hashes, has no timeout for the list of files, and uses an older commit from the
cache if the Hub denies access; so each file is downloaded separately.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import ModelInfo, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from transformers.utils import logging

from ..errors import HubError
from .network import Repository, Unanswered

logger = logging.get_logger(__name__)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass
class Snapshot:
    """The files of one commit.

    Attributes:
        files: path -> metadata of the file on the Hub.
    """

    repo: Repository
    cache: Path
    commit: str
    files: dict[str, RepoSibling]

    @property
    def folder(self) -> Path:
        return self.cache / f"models--{self.repo.repo_id.replace('/', '--')}" / "snapshots" / self.commit

    def download(self, names: Iterable[str], trusting: bool = False) -> Path:
        """Download files into the cache and return their folder.

        Args:
            trusting: use a file in the cache if its size is right, without computing its hash.

        Raises:
            HubError: a file could not be downloaded, or its hash is wrong; it is not kept.
        """
        for name in names:
            path, again = self.folder / name, False
            if trusting and path.is_file() and path.stat().st_size == size_of(self.files[name]):
                continue
            for _ in range(3):
                path = self.repo.ask(partial(self._file, name, again), name)
                if _has_right_hash(path, self.files[name]):
                    break
                again = True
                path.resolve().unlink(missing_ok=True)  # so that no other program uses it
                path.unlink(missing_ok=True)
            else:
                raise HubError(
                    f"{self.repo.call}: {name} was downloaded three times and each time differed from its hash on the "
                    f"Hub ({size_of(self.files[name])} bytes). Nothing was kept. Try again; if it happens again, a "
                    "proxy may be changing files."
                )
        return self.folder

    def _file(self, name: str, again: bool) -> Path:
        repo = self.repo
        return Path(
            hf_hub_download(
                repo.repo_id, name, revision=self.commit, token=repo.token, cache_dir=self.cache,
                endpoint=repo.endpoint, force_download=again,
            )
        )  # fmt: skip

    def record_revision(self) -> None:
        """Record the commit of the branch or tag in the cache, for offline use, once all files are downloaded."""
        revision = (self.repo.revision or "main").lstrip("/")
        ref = self.folder.parents[1] / "refs" / revision
        if _COMMIT.fullmatch(revision) or ".." in revision.split("/"):
            return
        if ref.is_file() and ref.read_text(encoding="utf-8") == self.commit:
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        temporary = ref.with_name(f".{ref.name}.{os.getpid()}.tmp")
        temporary.write_text(self.commit, encoding="utf-8")
        temporary.replace(ref)


def snapshot_of(repo: Repository, info: ModelInfo, cache: Path) -> Snapshot:
    """The repository at the commit in the response of the Hub.

    Raises:
        ValueError: the response has no valid commit.
    """
    if info.sha is None or not _COMMIT.fullmatch(info.sha):
        raise ValueError(f"{info.sha!r} is not a commit")
    return Snapshot(repo, cache, info.sha, {file.rfilename: file for file in info.siblings or ()})


def fetch(
    repo: Repository,
    cache: Path,
    download: Callable[[Snapshot], Path],
    cached: Callable[[], Path | None],
    command: str,
    local_files_only: bool = False,
) -> Path:
    """Download files of one commit from the Hub, and return the folder of that commit in the cache.

    Args:
        download: downloads the needed files of a snapshot.
        cached: returns the folder in the cache if it has all needed files.
        command: the command that downloads them, for messages.
        local_files_only: use the cache and send no request, as with HF_HUB_OFFLINE.

    Raises:
        HubError: they could not be loaded.
    """
    if local_files_only or constants.is_offline_mode():
        found = cached()
        if found is None:
            raise HubError(
                f"{repo.call}: offline (HF_HUB_OFFLINE or local_files_only), and the cache {cache} does not have "
                f"{repo.repo_id} at {repo.revision or 'main'!r}. Download it once with a network: {command}"
            )
        return found
    try:
        snapshot = repo.ask(lambda: snapshot_of(repo, repo.info(), cache))
    except Unanswered:
        found = cached()
        if found is None:
            raise
        logger.warning(f"{repo.call}: the Hub does not answer; using commit {found.name} from the cache.")
        return found
    folder = download(snapshot)
    snapshot.record_revision()
    return folder


def in_cache(repo: Repository, cache: Path, *names: str) -> Path | None:
    """The cached folder of the commit to which the revision was last resolved.

    Args:
        names: files whose presence marks the commit as downloaded; any of them is enough.
    """
    for name in names:
        found = try_to_load_from_cache(repo.repo_id, name, cache_dir=cache, revision=repo.revision)
        if isinstance(found, str):
            return Path(found.removesuffix(name))
    return None


def size_of(entry: RepoSibling) -> int:
    """The size of a file on the Hub in bytes."""
    return int((entry.lfs.size if entry.lfs else entry.size) or 0)


def _has_right_hash(path: Path, entry: RepoSibling) -> bool:
    """Whether a file has the hash on the Hub, if there is one: of its content, or of its git object."""
    if entry.lfs is None and entry.blob_id is None:  # some mirrors have no hashes
        return True
    with path.open("rb") as file:
        return sha_fileobj(file).hex() == entry.lfs.sha256 if entry.lfs else git_hash(file.read()) == entry.blob_id
