"""A repository at one commit, in the client's cache; each file is compared with the hash that the Hub gives.

`snapshot_download` does not compare hashes, waits without limit for the list of files, and takes an older commit from
the cache where the Hub refuses access; so each file is downloaded by itself.
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
        files: path -> what the Hub says of the file.
    """

    repo: Repository
    cache: Path
    commit: str
    files: dict[str, RepoSibling]

    @property
    def folder(self) -> Path:
        return self.cache / f"models--{self.repo.repo_id.replace('/', '--')}" / "snapshots" / self.commit

    def download(self, names: Iterable[str], trusting: bool = False) -> Path:
        """Download files into the cache; their folder.

        Args:
            trusting: take a file that the cache has at its full size as it is, without computing its hash.

        Raises:
            HubError: a file could not be downloaded, or not as the Hub has it; it is not kept.
        """
        for name in names:
            path, again = self.folder / name, False
            if trusting and path.is_file() and path.stat().st_size == size_of(self.files[name]):
                continue
            for _ in range(3):
                path = self.repo.ask(partial(self._file, name, again), name)
                if _is_whole(path, self.files[name]):
                    break
                again = True
                path.resolve().unlink(missing_ok=True)  # so that no other program takes it for the file
                path.unlink(missing_ok=True)
            else:
                raise HubError(
                    f"{self.repo.call}: {name} arrived three times with other content than the Hub says it has "
                    f"({size_of(self.files[name])} bytes). Nothing was kept. Try again; if it happens each time, "
                    "something on the way changes files."
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

    def note(self) -> None:
        """Let the cache know the commit of the branch or tag, for offline use; called when all files are there."""
        revision = (self.repo.revision or "main").lstrip("/")
        ref = self.folder.parents[1] / "refs" / revision
        if _COMMIT.fullmatch(revision) or ".." in revision.split("/"):
            return
        if ref.is_file() and ref.read_text(encoding="utf-8") == self.commit:
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        aside = ref.with_name(f".{ref.name}.{os.getpid()}.tmp")
        aside.write_text(self.commit, encoding="utf-8")
        aside.replace(ref)


def snapshot_of(repo: Repository, info: ModelInfo, cache: Path) -> Snapshot:
    """The repository at the commit that the Hub has told of.

    Raises:
        ValueError: it told none.
    """
    if info.sha is None or not _COMMIT.fullmatch(info.sha):
        raise ValueError(f"{info.sha!r} is not a commit")
    return Snapshot(repo, cache, info.sha, {file.rfilename: file for file in info.siblings or ()})


def fetch(
    repo: Repository,
    cache: Path,
    download: Callable[[Snapshot], Path],
    cached: Callable[[], Path | None],
    once: str,
    local_files_only: bool = False,
) -> Path:
    """Download files of one commit from the Hub; the folder of that commit in the cache.

    Args:
        download: downloads what is needed of a snapshot.
        cached: the folder in the cache, where it has all that is needed.
        once: the command that downloads it, for messages.
        local_files_only: take them from the cache and ask nothing. HF_HUB_OFFLINE does the same.

    Raises:
        HubError: they could not be loaded.
    """
    if local_files_only or constants.is_offline_mode():
        found = cached()
        if found is None:
            raise HubError(
                f"{repo.call}: the network was not asked (HF_HUB_OFFLINE or local_files_only), and the cache {cache} "
                f"does not hold {repo.repo_id} at {repo.revision or 'main'!r}. Download it once with a network: {once}"
            )
        return found
    try:
        snapshot = repo.ask(lambda: snapshot_of(repo, repo.info(), cache))
    except Unanswered:
        found = cached()
        if found is None:
            raise
        logger.warning(f"{repo.call}: the Hub does not answer; commit {found.name} is used from the cache.")
        return found
    folder = download(snapshot)
    snapshot.note()
    return folder


def in_cache(repo: Repository, cache: Path, *names: str) -> Path | None:
    """The folder in the cache of the commit that the revision was when it was last asked for.

    Args:
        names: a file of the repository that marks it as downloaded; the first that is there.
    """
    for name in names:
        found = try_to_load_from_cache(repo.repo_id, name, cache_dir=cache, revision=repo.revision)
        if isinstance(found, str):
            return Path(found.removesuffix(name))
    return None


def size_of(said: RepoSibling) -> int:
    """The bytes of a file, as the Hub has it."""
    return int((said.lfs.size if said.lfs else said.size) or 0)


def _is_whole(path: Path, said: RepoSibling) -> bool:
    """Whether a file has the hash that the Hub gives, if any: of the content, or of git's object."""
    if said.lfs is None and said.blob_id is None:  # some mirrors give none
        return True
    with path.open("rb") as file:
        return sha_fileobj(file).hex() == said.lfs.sha256 if said.lfs else git_hash(file.read()) == said.blob_id
