"""Requests to the Hub: what fails for a passing reason is tried again; anything else becomes one `HubError`.

huggingface_hub waits without limit for an answer, and gives up at once on many faults that pass. Here each attempt has
a limit of time, and each call a limit of attempts. No message ever holds a token.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from huggingface_hub import HfApi, ModelInfo, constants, get_session, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import logging

from ..errors import HubError, LoraError

T = TypeVar("T")
logger = logging.get_logger(__name__)

ATTEMPTS = 5
LONGEST_WAIT = 60.0
"""Seconds between two attempts. A server that asks for more gets an error that says so."""
PATIENCE = 180.0
"""Seconds after which a call is not tried again."""
SILENCE = 60.0
"""Seconds without a byte after which an attempt counts as lost."""
PASSING = (408, 409, 412, 425, 429, 500, 502, 503, 504)
"""Answers that another attempt may change: another writer's commit came first, too many requests, a busy server."""
NEVER_SENT = ("UnsupportedProtocol", "LocalProtocolError", "InvalidURL")
"""The HTTP client's errors for an endpoint or a token that no request can be made with."""
TRANSPORT: tuple[type[BaseException], ...] = (
    next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError"), ConnectionError, TimeoutError,
)  # fmt: skip
"""Errors of a request. The first is the base of the HTTP client's: huggingface_hub 1 uses httpx, 2 uses httpx2."""


class Unanswered(HubError):
    """There is no connection to the Hub, none is wanted, or the Hub is out of order."""


@dataclass
class Repository:
    """A repository on the Hub at one revision.

    Attributes:
        revision: branch, tag, commit or `refs/pr/1`; None: `main`.
        token: None: that of `hf auth login` or HF_TOKEN.
        endpoint: of another Hub.
        call: what is being done, for messages.
        private: if it is created. None: as the account's settings say.
    """

    repo_id: str
    revision: str | None
    token: str | bool | None
    endpoint: str | None
    call: str
    private: bool | None = None

    @property
    def api(self) -> HfApi:
        return HfApi(endpoint=self.endpoint, token=self.token)

    def info(self) -> ModelInfo:
        """The commit of the revision, with the size and the hash of each file: one request."""
        return self.api.model_info(self.repo_id, revision=self.revision, files_metadata=True, timeout=SILENCE)

    def ask(self, do: Callable[[], T], step: str = "", *, writing: bool = False, then: str = "") -> T:
        """Call `do`, again after a fault that passes.

        Args:
            step: which part of the call it is, for messages.
            writing: whether it needs the right to write.
            then: what holds after a failure, and how to go on.

        Raises:
            HubError: it failed, and why. Unanswered: since there is no way to the Hub.
        """
        begin, attempt = time.monotonic(), 0
        while True:
            attempt += 1
            try:
                with _limited():
                    return do()
            except LoraError:
                raise
            except Exception as error:
                pause = _pause(error, attempt)
                if pause is None or attempt == ATTEMPTS or time.monotonic() - begin + pause > PATIENCE:
                    raise self.refusal(error, step, writing=writing, then=then) from cause(error, self.token)
                said = reason(error, self.token).rstrip(".")
                logger.warning(f"{self.call}: {said}. Trying again in {pause:.0f} s.")
            time.sleep(pause)

    def refusal(self, error: BaseException, step: str = "", *, writing: bool = False, then: str = "") -> HubError:
        """The error that a caller gets: what was asked, what is wrong, and what to do."""
        found, status, said = root(error), status_of(error), reason(error, self.token)
        name, where = self.repo_id, self.endpoint or constants.ENDPOINT
        known = self.token is not False and bool(self.token or get_token())
        login = "Log in with `hf auth login`, set HF_TOKEN, or pass token=."
        if isinstance(found, OfflineModeIsEnabled):
            what = "HF_HUB_OFFLINE is set. Unset it, or name a folder"
        elif isinstance(found, GatedRepoError):
            what = f"{name} is gated. Ask for access at {where}/{name}. {'' if known else login}"
        elif isinstance(found, RevisionNotFoundError):
            what = f"{name} has no branch, tag or commit {self.revision or 'main'!r}. {self._revisions()}"
        elif writing and status == 403:
            what = f"the token may not write to {name} ({said}). Use one with the role `write` of an account that "
            what += "owns it, or open a pull request with create_pr=True"
        elif isinstance(found, RepositoryNotFoundError) or status == 404:
            access = "the token has no access to it" if known else "no token was given"
            what = f"there is no model repository {name} at {where}, or it is private and {access}. Check the name. "
            what += "" if known else login
        elif status == 401:
            what = f"{said}: {'the token is not valid' if known else 'a token is needed'}. {login}"
        elif status == 403:
            what = f"the token gives no access to {name} ({said})"
        elif status is not None:
            wait = _asked_for(found)
            what = said + (f" and asks to wait {wait:.0f} s" if wait else "")
            what += ". Try again later" if status in PASSING else ""
        elif isinstance(found, TRANSPORT):
            what = f"no answer came from {where} ({said}). Check the connection and try again"
        else:
            what = f"the answer from {where} cannot be used ({said}). Try again"
        opening = f"{self.call}, {step}" if step else self.call
        passing = (isinstance(found, TRANSPORT) and status is None) or (status or 0) >= 500
        return (Unanswered if passing else HubError)(f"{opening}: {what.strip().rstrip('.')}. {then}".strip())

    def _revisions(self) -> str:
        """The names that a revision may have."""
        try:
            with _limited():
                refs = self.api.list_repo_refs(self.repo_id)
        except Exception:
            return "Check the name."
        return f"It has {', '.join([ref.name for ref in (*refs.branches, *refs.tags)][:20])}."


def _pause(error: Exception, attempt: int) -> float | None:
    """Seconds to wait before another attempt; None where there should be none."""
    found, status = root(error), status_of(error)
    if status is not None and status not in PASSING:
        return None
    if isinstance(found, OfflineModeIsEnabled) or type(found).__name__ in NEVER_SENT:
        return None
    if isinstance(found, OSError) and found.errno is not None and not isinstance(found, TRANSPORT):
        return None  # no space, no permission: this machine's own
    asked = _asked_for(found)
    if asked is not None:
        return asked if asked <= LONGEST_WAIT else None
    return float(min(2 ** (attempt - 1), LONGEST_WAIT))


def _asked_for(error: BaseException) -> float | None:
    """Seconds that the server wants us to wait."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    found = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After") or "")
    found = found or re.search(r"\br=0\s*;\s*t=(\d+)", headers.get("ratelimit") or "")
    return float(found[1]) if found else None


_lock = threading.Lock()
_running = 0
_before: Any = None


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Give the client, which all threads share, a limit of time where it has none; several calls may overlap."""
    global _before, _running
    client = get_session()
    with _lock:
        _running += 1
        if client.timeout.read is None:
            _before, client.timeout = client.timeout, SILENCE
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if _running == 0 and _before is not None:
                client.timeout, _before = _before, None


# Errors --------------------------------------------------------------------------------------------------------------


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was made of."""
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__ or at.__context__


def root(error: BaseException) -> BaseException:
    """The HTTP or connection error that another one was made of; itself where there is none."""
    return next((found for found in _chain(error) if isinstance(found, TRANSPORT)), error)


def status_of(error: BaseException) -> int | None:
    """The status of the answer that an error is about; None where none came."""
    status: int | None = getattr(getattr(root(error), "response", None), "status_code", None)
    return status


def scrub(text: str, token: str | bool | None = None) -> str:
    """A text without tokens."""
    for secret in (token, get_token()):
        if isinstance(secret, str) and secret.strip():
            for form in (repr(secret)[1:-1], secret.strip()):  # the client quotes one that cannot be in a header
                text = text.replace(form, "***")
    return re.sub(r"\bhf_[A-Za-z0-9]{16,}", "***", text)


def reason(error: BaseException, token: str | bool | None = None) -> str:
    """What went wrong, in a line."""
    found, status = root(error), status_of(error)
    if status is not None:
        message = getattr(found, "server_message", None) or ""
        return scrub(f"the Hub answered {status}" + (f" ({message.splitlines()[0]})" if message else ""), token)
    first = (str(found).strip().splitlines() or [""])[0]
    return scrub(f"{type(found).__name__}: {first}" if first else type(found).__name__, token)


def cause(error: BaseException, token: str | bool | None) -> BaseException | None:
    """The error to show as the cause; None where its text, or that of one behind it, holds a token."""
    return None if any(scrub(str(found), token) != str(found) for found in _chain(error)) else error
