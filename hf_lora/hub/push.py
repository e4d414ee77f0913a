"""Bring an adapter to the Hub: its own files alone, in one commit that is there or is not.

Everything that can be checked here is checked before the network is asked. The commit names the one that it was made
on, so that one of somebody else in between is seen; then all is done again on top of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from ..errors import AdapterFileError, Faults, HubError, LoraError
from ..files.format import (
    CONFIG_NAME,
    EXTRAS_NAME,
    FULL_MODEL_FILES,
    LEGACY_WEIGHTS_NAME,
    WEIGHTS_NAME,
    read_config,
    read_extras,
)
from ..safe_io.reading import own_file, own_folder
from .card.readme import one_of_two
from .names import ADAPTER, CARD_NAME, PICTURES, PROCESSING, check_repository, check_subfolder, chosen
from .network import cause, explain, retried, was_lost
from .place import Listing, Place

logger = logging.get_logger(__name__)


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    subfolder: str | None = None,
    tokenizer: bool = True,
    call: str | None = None,
) -> CommitInfo:
    """Push the adapter in a folder, and those in folders of their own in it, as one commit.

    Up go `adapter_config.json`, `adapter_model.safetensors`, `hf_lora.json`, README.md with its pictures, and the
    tokenizer or processor that lies beside them; never a checkpoint, an optimizer's state or anything else. A file
    that the Hub has already is not sent again, and where nothing has changed there is no new commit.

    Args:
        repo_id: `user/adapter`; without a user, that of the token. It is created where it does not exist.
        private: for a new repository; None: as the account's settings say.
        revision: the branch; one that does not exist is made from `main`. None: `main`.
        create_pr: open a pull request against `revision` in place of committing to it.
        commit_message: None: `Upload adapter`.
        token: None: the one of `hf auth login` or HF_TOKEN.
        endpoint: of another Hub.
        subfolder: where in the repository the folder's files go; None: its root.
        tokenizer: push tokenizers and processors too.
        call: how messages name this; not given, by folder and repository.

    Returns:
        What the client says of the commit: `oid`, `commit_url`, and `pr_url` of a pull request.

    Raises:
        AdapterFileError: the folder holds no whole adapter; the network was not asked.
        HubError: the Hub refused it or could not be reached. The folder and the repository are as they were, or the
            commit is there whole.
    """
    call = call or f"pushing {str(folder)!r} to {repo_id!r}"
    inside = check_subfolder(subfolder, call)
    check_repository(repo_id, f"{call}:")
    if (revision or "").startswith("refs/") and create_pr:
        raise HubError(f"{call}: create_pr=True opens a pull request against a branch, and {revision!r} is none.")
    files = pushed_files(folder, call, tokenizer)
    prefix = f"{inside}/" if inside else ""
    target = Target(repo_id, revision, create_pr, private, token, endpoint, call)
    message = commit_message or "Upload adapter"
    return target.commit({prefix + name: path for name, path in files.items()}, message, commit_description or "")


def ensure_repository(
    repo_id: str, *, private: bool | None = None, token: str | bool | None = None, endpoint: str | None = None
) -> str:
    """Make a repository where there is none; its whole name, with the user.

    Raises:
        HubError: it cannot be made, or the token may not write.
    """
    call = f"making the repository {repo_id!r}"
    try:
        api = HfApi(endpoint=endpoint, token=token)
        return retried(call, lambda: api.create_repo(repo_id, private=private, exist_ok=True).repo_id, token=token)
    except Exception as error:
        raise explain(error, call, repo_id, token=token, endpoint=endpoint, writing=True) from cause(error, token)


def pushed_files(folder: str | os.PathLike[str], call: str, tokenizer: bool = True) -> dict[str, Path]:
    """Path in the repository -> file, of what is pushed of a folder.

    Raises:
        AdapterFileError: it holds no adapter, or one that is not whole; lists every fault.
    """
    root = Path(folder)
    if not root.is_dir():
        raise AdapterFileError(f"{call}: {root} is no folder.")
    adapters = [p for p in (root, *sorted(root.iterdir())) if _is_adapter(p, root)]
    if not adapters:
        full = [name for name in FULL_MODEL_FILES if (root / name).is_file()]
        also = f"It holds a full model ({', '.join(full)}): push that with its own push_to_hub. " if full else ""
        raise AdapterFileError(f"{call}: {root} holds no adapter (no {CONFIG_NAME}). {also}".strip())
    faults = Faults(call)
    files: dict[str, Path] = {}
    for adapter in adapters:
        fault = _fault(adapter)
        if fault:
            faults.add(fault)
        patterns = (*ADAPTER, CARD_NAME, PICTURES, *(PROCESSING if tokenizer else ()))
        below = (p.relative_to(adapter).as_posix() for p in adapter.rglob("*") if p.is_file())
        prefix = "" if adapter == root else f"{adapter.name}/"
        files |= {prefix + name: adapter / name for name in chosen(below, patterns)}
    if root not in adapters:  # the card and the tokenizer of several adapters lie above them
        above = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
        patterns = (CARD_NAME, PICTURES, *(PROCESSING if tokenizer else ()))
        files |= {name: root / name for name in chosen(above, patterns)}
    for path in files.values():
        try:
            own_file(own_folder(root, path.parent.relative_to(root).as_posix()), path.name)
        except AdapterFileError as error:
            if str(error) not in faults.found:  # of a folder it is said once
                faults.add(str(error))
    faults.check(AdapterFileError, "Nothing was sent. Save the adapter again, or name its folder.")
    return dict(sorted(files.items()))


def _is_adapter(path: Path, root: Path) -> bool:
    return (path / CONFIG_NAME).is_file() and (path == root or not path.name.startswith(("checkpoint-", ".", "_")))


def _fault(folder: Path) -> str:
    """What is wrong with an adapter's folder; empty where it is whole."""
    try:
        read_config(folder)
        read_extras(folder)
        weights = folder / WEIGHTS_NAME
        if not weights.is_file():
            old = (folder / LEGACY_WEIGHTS_NAME).is_file()
            how = f"; convert the old one with: hf-lora convert {folder} --out FOLDER" if old else ""
            return f"{folder} holds no {WEIGHTS_NAME}{how}"
        with safe_open(weights, framework="pt") as file:
            if not list(file.keys()):
                return f"{weights} holds no tensors"
    except (SafetensorError, OSError) as error:
        return f"{folder / WEIGHTS_NAME} cannot be read ({error})"
    except AdapterFileError as error:
        return str(error)
    return ""


@dataclass
class Target:
    """A branch of a repository, which need not exist yet."""

    repo_id: str
    revision: str | None
    create_pr: bool
    private: bool | None
    token: str | bool | None
    endpoint: str | None
    call: str

    def commit(
        self,
        files: Mapping[str, Path | bytes],
        message: str,
        description: str = "",
    ) -> CommitInfo:
        """Put files there in one commit. Of a card, what somebody wrote on the Hub is kept: see `one_of_two`.

        Raises:
            HubError: see `push_folder`.
        """
        then = (
            "Nothing here was changed, and on the Hub is what was there or the whole commit. Make the same call again."
        )
        api = HfApi(endpoint=self.endpoint, token=self.token)
        step = "asking for the repository"

        def attempt() -> CommitInfo:
            nonlocal step
            step = "asking for the repository"
            head, present = self._prepare(api)
            self._refuse_full_model(files, present)
            step = "reading the card on the Hub"
            contents = dict(files)
            for card in files:
                if card.rpartition("/")[2] == CARD_NAME:
                    contents[card] = self._card(api, card, files[card], head if card in present else None)
            operations: list[Any] = [
                CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
                for path, content in contents.items()
            ]
            extras = {f"{path.removesuffix(CONFIG_NAME)}{EXTRAS_NAME}" for path in files if _is_config(path)}
            operations += [  # those of another adapter, which is replaced
                CommitOperationDelete(path, is_folder=False) for path in sorted((extras - files.keys()) & present)
            ]
            step = "committing"
            return api.create_commit(
                self.repo_id, operations, commit_message=message, commit_description=description,
                revision=self.revision, create_pr=self.create_pr, parent_commit=head,
            )  # fmt: skip

        def once() -> CommitInfo:
            try:
                return attempt()
            except LoraError:
                raise
            except Exception as error:
                if self.create_pr and _at_commit(error) and was_lost(error):
                    where = f"{self.endpoint or constants.ENDPOINT}/{self.repo_id}/discussions"
                    raise HubError(
                        f"{self.call}: the answer to the commit was lost, and the pull request may have been opened. "
                        f"Look at {where} before you push again."
                    ) from cause(error, self.token)
                raise

        try:
            return retried(self.call, once, token=self.token)
        except LoraError:
            raise
        except Exception as error:
            raise explain(
                error, f"{self.call}, {step}", self.repo_id, revision=self.revision, token=self.token,
                endpoint=self.endpoint, writing=True, then=then,
            ) from cause(error, self.token)  # fmt: skip

    def _prepare(self, api: HfApi) -> tuple[str, set[str]]:
        """(the commit to go on from, the paths that are there); makes the repository and the branch."""
        if "/" not in self.repo_id:
            self.repo_id = f"{api.whoami()['name']}/{self.repo_id}"
        try:
            info = api.model_info(self.repo_id, revision=self.revision)
        except RevisionNotFoundError:
            if self.create_pr or (self.revision or "").startswith("refs/"):
                raise  # neither is made by committing to it
            assert self.revision is not None
            api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            info = api.model_info(self.repo_id, revision=self.revision)
        except RepositoryNotFoundError:
            self.repo_id = api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
            if self.revision not in (None, "main") and not self.create_pr:
                assert self.revision is not None
                api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            info = api.model_info(self.repo_id, revision=self.revision)
        if info.sha is None:
            raise ValueError("the repository has no commit")
        return info.sha, {sibling.rfilename for sibling in info.siblings or ()}

    def _refuse_full_model(self, files: Mapping[str, Any], present: set[str]) -> None:
        """Other loaders take an adapter beside a full model for the full model, and overlook it."""
        for path in files:
            folder = path.removesuffix(CONFIG_NAME)
            beside = [f for f in FULL_MODEL_FILES if folder + f in present]
            if _is_config(path) and beside:
                raise HubError(
                    f"{self.call}: {self.repo_id} holds a full model there ({', '.join(beside)}), and other loaders "
                    "would overlook the adapter beside it. Push to a repository of its own, or with subfolder=."
                )

    def _card(self, api: HfApi, path: str, here: Path | bytes, head: str | None) -> bytes:
        local = here.read_bytes() if isinstance(here, Path) else here
        there = b""
        if head is not None:
            said = api.get_paths_info(self.repo_id, path, revision=head)
            place = Place(self.repo_id, head, self.token, self.endpoint, Path(constants.HF_HUB_CACHE), self.call)
            there = place.bring(Listing(head, {path: said[0]}), path).read_bytes()
        try:
            return one_of_two(local.decode("utf-8"), there.decode("utf-8"), f"{self.call}, {path}").encode()
        except UnicodeDecodeError as error:
            raise AdapterFileError(
                f"{self.call}: {path}, here or on the Hub, is not UTF-8 ({error}). Nothing was sent. Repair it "
                "there, or take it away, and push again."
            ) from error


def _is_config(path: str) -> bool:
    return path.rpartition("/")[2] == CONFIG_NAME


def _at_commit(error: BaseException) -> bool:
    """Whether the request that failed was the commit itself."""
    at: BaseException | None = error
    while at is not None:
        try:
            url = str(at.request.url)  # type: ignore[attr-defined]
        except (AttributeError, RuntimeError):
            url = ""
        if "/commit/" in url:
            return True
        at = at.__cause__ or at.__context__
    return False
