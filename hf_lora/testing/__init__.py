"""A Hugging Face Hub on the loopback interface, for tests of code that pushes and pulls adapters.

    with LocalHub() as hub:
        push("out/adapter", "user/adapter", token=hub.token, endpoint=hub.url)
        assert "adapter_model.safetensors" in hub.files("user/adapter")

It keeps everything in memory, listens only on 127.0.0.1, needs only the standard library, and works with the real
`huggingface_hub` client. It does not support Xet: `environment` and `active` set `HF_HUB_DISABLE_XET`, with which the
client uses LFS.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .api import Api
from .faults import Fault, Step
from .server import HOST, Logged, Server
from .store import Commit, Repo, User, new_repo

__all__ = ["Fault", "LocalHub", "Logged"]


class LocalHub:
    """A Hub for tests; a context manager.

    Attributes:
        url: value for `endpoint=` while it runs.
        token: token of the user `user`, with write permission.
        requests: the requests since the start, or since `clear()`.
    """

    def __init__(self, user: str = "user", *, chunk_size: int | None = None) -> None:
        """
        Args:
            user: the name of the first user.
            chunk_size: larger uploads are split into parts of this many bytes (LFS multipart); None: never split.
        """
        self.api = Api()
        self.api.chunk_size = chunk_size
        self.token = self.add_user(user)
        self._server: Server | None = None

    # Running ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> LocalHub:
        self._server = Server(self.api.respond)
        self.api.url = self._server.url
        serve = {"poll_interval": 0.02}
        threading.Thread(target=self._server.serve_forever, kwargs=serve, daemon=True, name="LocalHub").start()
        return self

    def __exit__(self, *_: object) -> None:
        server = self._running()
        server.closing.set()
        server.shutdown()
        server.server_close()
        self._server = None

    def _running(self) -> Server:
        if self._server is None:
            raise RuntimeError("The LocalHub is not running. Use it in a with block: with LocalHub() as hub: …")
        return self._server

    @property
    def url(self) -> str:
        return self._running().url

    @property
    def requests(self) -> list[Logged]:
        return self._running().log

    def asked(self, pattern: str) -> list[Logged]:
        """The requests so far that match `"METHOD path"`, with `*` and `?`."""
        return [line for line in list(self.requests) if fnmatch.fnmatchcase(str(line), pattern)]

    def clear(self) -> None:
        """Clear the log and the faults."""
        self.requests.clear()
        self._running().faults.clear()

    # Connecting clients ----------------------------------------------------------------------------------------------

    def environment(self, home: str | os.PathLike[str], token: str | None = "") -> dict[str, str]:
        """The environment of a process that uses this Hub: `subprocess.run(command, env=hub.environment(folder))`.

        Args:
            home: the folder for its cache and settings, such as a new one.
            token: None for no token; default: that of the first user.
        """
        own = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_")
        values = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        values |= {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": os.fspath(home)}
        values |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        values |= {"NO_PROXY": HOST, "no_proxy": HOST}  # if both are set, the lower-case one is used
        token = self.token if token == "" else token
        return values | ({"HF_TOKEN": token} if token else {})

    @contextlib.contextmanager
    def active(self, home: str | os.PathLike[str], token: str | None = "") -> Iterator[LocalHub]:
        """Make this the Hub of the running process within a `with` block, even if clients are imported already.

        The client reads its environment when it is imported, so the values that it read are replaced. This affects
        calls without `endpoint=`, such as `from_pretrained` of transformers. It does not support several threads with
        different Hubs.
        """
        from huggingface_hub import constants

        cache, url = str(Path(home, "hub")), self.url
        values: dict[str, object] = {
            "ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HOME": str(home), "HF_HUB_CACHE": cache, "HUGGINGFACE_HUB_CACHE": cache,
            "HF_TOKEN_PATH": str(Path(home, "token")),
        }  # fmt: skip
        before = {name: getattr(constants, name) for name in values if hasattr(constants, name)}
        token = self.token if token == "" else token
        settings = {"HF_TOKEN": token, "HUGGING_FACE_HUB_TOKEN": None, "NO_PROXY": HOST, "no_proxy": HOST}
        environment = {name: os.environ.get(name) for name in settings}
        clients = _shared_clients()
        try:
            for client in clients:
                client.endpoint = url
            for name in before:
                setattr(constants, name, values[name])
            for name, value in settings.items():
                _set(name, value)
            yield self
        finally:
            for name, value in before.items():
                setattr(constants, name, value)
            for client in _shared_clients():  # some may have been made meanwhile
                client.endpoint = constants.ENDPOINT
            for name, value in environment.items():
                _set(name, value)

    # Contents --------------------------------------------------------------------------------------------------------

    def add_user(self, name: str, *, write: bool = True) -> str:
        """Add a user, or another token of an existing one, and return the token. Without `write` it is read-only."""
        token = f"hf_local{len(self.api.users)}{name}"
        self.api.users[token] = User(name, token, write)
        return token

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | str | os.PathLike[str] | None = None,
        *,
        private: bool = False,
        gated: bool = False,
    ) -> Repo:
        """Add a repository, optionally with a commit of files or of the files in a folder."""
        repo = self.api.repos[repo_id] = new_repo(repo_id, private, gated)
        if files is not None:
            self.add_files(repo_id, files)
        return repo

    def add_files(
        self, repo_id: str, files: Mapping[str, bytes] | str | os.PathLike[str], revision: str = "main"
    ) -> str:
        """Add files to a branch in one commit, without a client, and return the commit."""
        if not isinstance(files, Mapping):
            root = Path(files)
            files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        return self.repo(repo_id).put(files, revision=revision)

    def repo(self, repo_id: str) -> Repo:
        """A repository; KeyError if it does not exist."""
        return self.api.repos[repo_id]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content at a revision, without .gitattributes."""
        repo = self.repo(repo_id)
        tree = repo.commits[repo.resolve(revision) or revision].tree
        return {path: blob.data for path, blob in sorted(tree.items()) if path != ".gitattributes"}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits of a revision, newest first; the oldest is the initial commit of the Hub."""
        return self.repo(repo_id).history(revision)

    # Faults ----------------------------------------------------------------------------------------------------------

    def fail(
        self,
        on: Step,
        kind: str,
        *,
        after: int = 0,
        times: int = 1,
        status: int = 500,
        headers: Mapping[str, str] | None = None,
        seconds: float = 3600.0,
    ) -> Fault:
        """Make requests fail: see `Fault` for the arguments. `fired` of the result counts the failures."""
        fault = Fault(on, kind, after, times, status, headers or {}, seconds)
        self._running().faults.append(fault)
        return fault


def _shared_clients() -> list[Any]:
    """The global clients of huggingface_hub and transformers, each with its endpoint."""
    from huggingface_hub import hf_api

    theirs = getattr(sys.modules.get("transformers.utils.hub"), "_hf_api", None)
    return [client for client in (getattr(hf_api, "api", None), theirs) if client is not None]


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
