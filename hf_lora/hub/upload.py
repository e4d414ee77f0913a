"""Push an adapter to the Hub: only its files, in one atomic commit.

Everything that can be checked locally is checked before the first request. The commit names its parent, so that a
concurrent commit is detected; then the push is repeated on top of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, ModelInfo, constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ..errors import AdapterFileError, Faults, HubError
from ..files.format import CONFIG_NAME, EXTRAS_NAME, FULL_MODEL_FILES, read_adapter
from ..safe_io.reading import own_file, own_folder
from .card.readme import card_to_push
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
)
from .network import Repository, cause, root, status_of
from .snapshot import Snapshot, snapshot_of


def push(
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
    """Push the adapters in a folder and its direct subfolders to the Hub as one commit.

    It contains `adapter_config.json`, `adapter_model.safetensors`, `hf_lora.json`, README.md with its pictures, and
    the tokenizer or processor; never a checkpoint, an optimizer state or anything else. Files that the Hub already has
    are not sent again, and if nothing changed there is no new commit.

    Args:
        repo_id: `user/adapter`; default user: that of the token. The repository is created if it does not exist.
        private: for a new repository. Default: the account's setting.
        revision: the branch; one that does not exist is created from `main`. Default: `main`.
        create_pr: open a pull request against `revision` instead of committing to it.
        commit_message: default: `Upload adapter`.
        token: default: that of `hf auth login` or HF_TOKEN.
        endpoint: URL of another Hub.
        subfolder: folder in the repository for the files. Default: its root.
        tokenizer: also push tokenizers and processors.
        call: how messages name this call. Default: by folder and repository.

    Returns:
        The `CommitInfo` of huggingface_hub: `oid`, `commit_url`, and `pr_url` of a pull request.

    Raises:
        AdapterFileError: the folder holds no complete adapter; no request was sent.
        HubError: the Hub rejected the push or could not be reached. The folder and the repository are unchanged, or
            the whole commit exists.
    """
    call = call or f"pushing {str(folder)!r} to {repo_id!r}"
    repo = Repository(repo_id, revision, token, endpoint, call, private)
    inside = check_subfolder(subfolder, call)
    check_repository(repo_id, f"{call}: {repo_id!r} is")
    if (revision or "").startswith("refs/") and create_pr:
        raise HubError(f"{call}: create_pr=True needs a branch as revision, not {revision!r}.")
    prefix = f"{inside}/" if inside else ""
    files = {prefix + name: path for name, path in pushed_files(folder, call, tokenizer).items()}
    return commit_files(repo, files, commit_message or "Upload adapter", commit_description or "", create_pr)


def ensure_repository(
    repo_id: str, *, private: bool | None = None, token: str | bool | None = None, endpoint: str | None = None
) -> str:
    """Create a repository if it does not exist, and return its full name, with the user.

    Raises:
        HubError: it could not be created, or the token may not write.
    """
    repo = Repository(repo_id, None, token, endpoint, f"creating the repository {repo_id!r}", private)
    return repo.ask(partial(_create, repo), writing=True)


def _create(repo: Repository) -> str:
    return repo.api.create_repo(repo.repo_id, private=repo.private, exist_ok=True).repo_id


# The files -----------------------------------------------------------------------------------------------------------


def pushed_files(folder: str | os.PathLike[str], call: str, tokenizer: bool = True) -> dict[str, Path]:
    """Path in the repository -> local file, for all files of a folder that are pushed.

    Raises:
        AdapterFileError: it has no adapter, or an incomplete one; lists every fault.
    """
    top = Path(folder)
    if not top.is_dir():
        raise AdapterFileError(f"{call}: {top} is not a folder.")
    adapters = [path for path in (top, *sorted(top.iterdir())) if _is_adapter(path, top)]
    if not adapters:
        full = [name for name in FULL_MODEL_FILES if (top / name).is_file()]
        also = f" It holds a full model ({', '.join(full)}): push it with its own push_to_hub." if full else ""
        raise AdapterFileError(f"{call}: {top} has no adapter (no {CONFIG_NAME}).{also}")
    files, found = dict[str, Path](), dict[str, None]()
    others = (CARD_NAME, PICTURES, *MODULES, *(PROCESSING if tokenizer else ()))
    for place in {top: None, **dict.fromkeys(adapters)}:  # several adapters share the card and tokenizer of `top`
        patterns = (*ADAPTER, *others) if place in adapters else others
        prefix = "" if place == top else f"{place.name}/"
        files |= {prefix + name: place / name for name in chosen(files_below(place), patterns)}
    checks: list[Callable[[], object]] = [partial(read_adapter, place) for place in adapters]
    checks += [partial(_check_own, top, path) for path in files.values()]
    for check in checks:
        try:
            check()
        except AdapterFileError as error:
            found[str(error)] = None  # listed once if the folder is a link
    faults = Faults(call)
    for fault in found:
        faults.add(fault)
    faults.check(AdapterFileError, "Nothing was sent. Save the adapter again, or name its folder.")
    return dict(sorted(files.items()))


def _check_own(top: Path, path: Path) -> None:
    """Refuse a link that points outside the folder."""
    own_file(own_folder(top, path.parent.relative_to(top).as_posix()), path.name)


def _is_adapter(path: Path, top: Path) -> bool:
    return (path / CONFIG_NAME).is_file() and (path == top or not path.name.startswith(("checkpoint-", ".", "_")))


# The commit ----------------------------------------------------------------------------------------------------------


def commit_files(
    repo: Repository, files: Mapping[str, Path], message: str, description: str = "", create_pr: bool = False
) -> CommitInfo:
    """Commit files to a branch; the repository and the branch are created if they do not exist.

    Text added to the card on the Hub is kept: see `card_to_push`.

    Raises:
        HubError: see `push`.
    """

    def attempt() -> CommitInfo:
        head = snapshot_of(repo, _prepare(repo, create_pr), Path(constants.HF_HUB_CACHE))
        _refuse_full_model(repo, files, head)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path, _card(head, path, file) if file.name == CARD_NAME else str(file))
            for path, file in files.items()
        ]
        extras = {f"{path.removesuffix(CONFIG_NAME)}{EXTRAS_NAME}" for path in files if _is_config(path)}
        stale = sorted((extras - files.keys()) & head.files.keys())  # of a previous adapter
        operations += [CommitOperationDelete(path, is_folder=False) for path in stale]
        try:
            return repo.api.create_commit(
                repo.repo_id, operations, commit_message=message, commit_description=description,
                revision=repo.revision, create_pr=create_pr, parent_commit=head.commit,
            )  # fmt: skip
        except Exception as error:
            if create_pr and _may_be_done(error):
                where = f"{repo.endpoint or constants.ENDPOINT}/{repo.repo_id}/discussions"
                raise HubError(
                    f"{repo.call}: the response to the commit was lost, and the pull request may have been opened. "
                    f"Check {where} before you push again."
                ) from cause(error, repo.token)
            raise

    then = "Local files are unchanged; the Hub has the previous state or the whole commit. Repeat the same call."
    return repo.ask(attempt, writing=True, then=then)


def _prepare(repo: Repository, create_pr: bool) -> ModelInfo:
    """The current state of the repository; it and the branch are created if they do not exist."""
    api, branch = repo.api, None if (repo.revision or "main") == "main" or create_pr else repo.revision
    if "/" not in repo.repo_id:
        repo.repo_id = f"{api.whoami()['name']}/{repo.repo_id}"
    try:
        return repo.info()
    except RevisionNotFoundError:
        if branch is None or branch.startswith("refs/"):
            raise  # main and refs are never created
    except RepositoryNotFoundError:
        repo.repo_id = _create(repo)
    if branch is not None:
        api.create_branch(repo.repo_id, branch=branch, exist_ok=True)
    return repo.info()


def _refuse_full_model(repo: Repository, files: Mapping[str, Path], head: Snapshot) -> None:
    """Refuse to push an adapter next to a full model: other loaders would ignore the adapter."""
    for path in filter(_is_config, files):
        full = [name for name in FULL_MODEL_FILES if path.removesuffix(CONFIG_NAME) + name in head.files]
        if full:
            raise HubError(
                f"{repo.call}: {repo.repo_id} already holds a full model there ({', '.join(full)}), and other loaders "
                "would ignore an adapter next to it. Push to another repository, or pass subfolder=."
            )


def _card(head: Snapshot, path: str, file: Path) -> bytes:
    there = (head.download([path]) / path).read_bytes() if path in head.files else b""
    call = f"{head.repo.call}, {path}"
    try:
        return card_to_push(file.read_bytes().decode("utf-8"), there.decode("utf-8"), call).encode()
    except UnicodeDecodeError as error:
        raise AdapterFileError(
            f"{call}, local or on the Hub, is not UTF-8 ({error}). Nothing was sent. Repair it and push again."
        ) from error


def _is_config(path: str) -> bool:
    return path.rpartition("/")[2] == CONFIG_NAME


def _may_be_done(error: BaseException) -> bool:
    """Whether a commit may have been created: the response was lost, or could not be read."""
    try:
        url = str(root(error).request.url)  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return isinstance(error, (KeyError, json.JSONDecodeError, UnicodeDecodeError))
    return "/commit/" in url and status_of(error) in (None, 408, 500, 502, 504)
