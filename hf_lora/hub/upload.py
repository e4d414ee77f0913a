"""Push an adapter to the Hub: its own files alone, in one commit that is made whole or not at all.

Everything that can be checked here is checked before the network is asked. The commit names its parent, so another
writer's commit in between is noticed; then all is done again on top of it.
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
from .names import ADAPTER, CARD_NAME, PICTURES, PROCESSING, check_repository, check_subfolder, chosen, files_below
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
    """Push the adapter in a folder, and those in folders of their own in it, to the Hub as one commit.

    It holds `adapter_config.json`, `adapter_model.safetensors`, `hf_lora.json`, README.md with its pictures, and the
    tokenizer or processor beside them; never a checkpoint, an optimizer's state or anything else. A file that the Hub
    has already is not sent again, and where nothing has changed there is no new commit.

    Args:
        repo_id: `user/adapter`; without a user, that of the token. It is created where it does not exist.
        private: for a new repository. Default: as the account's settings say.
        revision: the branch; one that does not exist is made from `main`. Default: `main`.
        create_pr: open a pull request against `revision` instead of committing to it.
        commit_message: default: `Upload adapter`.
        token: default: that of `hf auth login` or HF_TOKEN.
        endpoint: of another Hub.
        subfolder: where in the repository the folder's files go. Default: its root.
        tokenizer: push tokenizers and processors too.
        call: how messages name this. Default: by folder and repository.

    Returns:
        What the client says of the commit: `oid`, `commit_url`, and `pr_url` of a pull request.

    Raises:
        AdapterFileError: the folder holds no complete adapter; the network was not asked.
        HubError: the Hub refused it or could not be reached. The folder and the repository are as they were, or the
            whole commit is there.
    """
    call = call or f"pushing {str(folder)!r} to {repo_id!r}"
    repo = Repository(repo_id, revision, token, endpoint, call, private)
    inside = check_subfolder(subfolder, call)
    check_repository(repo_id, f"{call}: {repo_id!r} is")
    if (revision or "").startswith("refs/") and create_pr:
        raise HubError(f"{call}: create_pr=True needs a branch to open a pull request against, not {revision!r}.")
    prefix = f"{inside}/" if inside else ""
    files = {prefix + name: path for name, path in pushed_files(folder, call, tokenizer).items()}
    return commit_files(repo, files, commit_message or "Upload adapter", commit_description or "", create_pr)


def ensure_repository(
    repo_id: str, *, private: bool | None = None, token: str | bool | None = None, endpoint: str | None = None
) -> str:
    """Create a repository where there is none; its full name, with the user.

    Raises:
        HubError: it could not be created, or the token may not write.
    """
    repo = Repository(repo_id, None, token, endpoint, f"making the repository {repo_id!r}", private)
    return repo.ask(partial(_create, repo), writing=True)


def _create(repo: Repository) -> str:
    return repo.api.create_repo(repo.repo_id, private=repo.private, exist_ok=True).repo_id


# The files -----------------------------------------------------------------------------------------------------------


def pushed_files(folder: str | os.PathLike[str], call: str, tokenizer: bool = True) -> dict[str, Path]:
    """Path in the repository -> file, of what is pushed of a folder.

    Raises:
        AdapterFileError: it holds no adapter, or an incomplete one; lists every fault.
    """
    top = Path(folder)
    if not top.is_dir():
        raise AdapterFileError(f"{call}: {top} is not a folder.")
    adapters = [path for path in (top, *sorted(top.iterdir())) if _is_adapter(path, top)]
    if not adapters:
        full = [name for name in FULL_MODEL_FILES if (top / name).is_file()]
        also = f" It holds a full model ({', '.join(full)}): push that with its own push_to_hub." if full else ""
        raise AdapterFileError(f"{call}: {top} holds no adapter (no {CONFIG_NAME}).{also}")
    files, found = dict[str, Path](), dict[str, None]()
    beside = (CARD_NAME, PICTURES, *(PROCESSING if tokenizer else ()))
    for place in {top: None, **dict.fromkeys(adapters)}:  # the card and tokenizer of several adapters are above them
        patterns = (*ADAPTER, *beside) if place in adapters else beside
        prefix = "" if place == top else f"{place.name}/"
        files |= {prefix + name: place / name for name in chosen(files_below(place), patterns)}
    checks: list[Callable[[], object]] = [partial(read_adapter, place) for place in adapters]
    checks += [partial(_check_own, top, path) for path in files.values()]
    for check in checks:
        try:
            check()
        except AdapterFileError as error:
            found[str(error)] = None  # of a folder that is a link, once
    faults = Faults(call)
    for fault in found:
        faults.add(fault)
    faults.check(AdapterFileError, "Nothing was sent. Save the adapter again, or name its folder.")
    return dict(sorted(files.items()))


def _check_own(top: Path, path: Path) -> None:
    """Refuse a link that leads out of the folder."""
    own_file(own_folder(top, path.parent.relative_to(top).as_posix()), path.name)


def _is_adapter(path: Path, top: Path) -> bool:
    return (path / CONFIG_NAME).is_file() and (path == top or not path.name.startswith(("checkpoint-", ".", "_")))


# The commit ----------------------------------------------------------------------------------------------------------


def commit_files(
    repo: Repository, files: Mapping[str, Path], message: str, description: str = "", create_pr: bool = False
) -> CommitInfo:
    """Commit files to a branch; the repository and the branch are created where they do not exist.

    Of a card, what somebody wrote on the Hub is kept: see `card_to_push`.

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
        stale = sorted((extras - files.keys()) & head.files.keys())  # of another adapter, which is replaced
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
                    f"{repo.call}: the answer to the commit was lost, and the pull request may have been opened. "
                    f"Look at {where} before you push again."
                ) from cause(error, repo.token)
            raise

    then = "Nothing here was changed, and on the Hub is what was there or the whole commit. Make the same call again."
    return repo.ask(attempt, writing=True, then=then)


def _prepare(repo: Repository, create_pr: bool) -> ModelInfo:
    """The repository as it is; it and the branch are created where they do not exist."""
    api, branch = repo.api, None if (repo.revision or "main") == "main" or create_pr else repo.revision
    if "/" not in repo.repo_id:
        repo.repo_id = f"{api.whoami()['name']}/{repo.repo_id}"
    try:
        return repo.info()
    except RevisionNotFoundError:
        if branch is None or branch.startswith("refs/"):
            raise  # neither is created by committing to it
    except RepositoryNotFoundError:
        repo.repo_id = _create(repo)
    if branch is not None:
        api.create_branch(repo.repo_id, branch=branch, exist_ok=True)
    return repo.info()


def _refuse_full_model(repo: Repository, files: Mapping[str, Path], head: Snapshot) -> None:
    """Other loaders take an adapter beside a full model for the full model, and overlook it."""
    for path in filter(_is_config, files):
        beside = [name for name in FULL_MODEL_FILES if path.removesuffix(CONFIG_NAME) + name in head.files]
        if beside:
            raise HubError(
                f"{repo.call}: {repo.repo_id} holds a full model there ({', '.join(beside)}), and other loaders would "
                "overlook the adapter beside it. Push to a repository of its own, or with subfolder=."
            )


def _card(head: Snapshot, path: str, file: Path) -> bytes:
    there = (head.download([path]) / path).read_bytes() if path in head.files else b""
    call = f"{head.repo.call}, {path}"
    try:
        return card_to_push(file.read_bytes().decode("utf-8"), there.decode("utf-8"), call).encode()
    except UnicodeDecodeError as error:
        raise AdapterFileError(
            f"{call}, here or on the Hub, is not UTF-8 ({error}). Nothing was sent. Repair it there and push again."
        ) from error


def _is_config(path: str) -> bool:
    return path.rpartition("/")[2] == CONFIG_NAME


def _may_be_done(error: BaseException) -> bool:
    """Whether a commit may have been made: its answer was lost, or could not be read."""
    try:
        url = str(root(error).request.url)  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return isinstance(error, (KeyError, json.JSONDecodeError, UnicodeDecodeError))
    return "/commit/" in url and status_of(error) in (None, 408, 500, 502, 504)
