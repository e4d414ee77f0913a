"""Requests to the Hub: transient failures are retried; any other becomes one `HubError`.

huggingface_hub has no read timeout, and does not retry many transient failures. Here each attempt has a timeout, and
each call a maximum number of attempts. No message contains a token.
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
    HFValidationError,
    LocalTokenNotFoundError,
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
"""Maximum seconds between two attempts. If the server asks for more, the call fails with an error that says so."""
TOTAL_WAIT = 180.0
"""Seconds after which a call is not retried."""
READ_TIMEOUT = 60.0
"""Seconds without a byte after which an attempt fails."""
TRANSIENT = (408, 409, 412, 425, 429, 500, 502, 503, 504)
"""Statuses that are retried: a concurrent commit, too many requests, a busy server."""
NEVER_SENT = ("UnsupportedProtocol", "LocalProtocolError", "InvalidURL")
"""The HTTP client's errors for an invalid endpoint or token, with which no request can be sent."""
NOT_ASKED = (OfflineModeIsEnabled, LocalTokenNotFoundError, HFValidationError)
"""The client's own errors before it asks: it is offline, there is no token, or the name is not one of a repository."""
TRANSPORT: tuple[type[BaseException], ...] = (
    next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError"), ConnectionError, TimeoutError,
)  # fmt: skip
"""Errors of a request. The first is the base class of the HTTP client: huggingface_hub 1 uses httpx, 2 uses httpx2."""


class Unanswered(HubError):
    """There is no connection to the Hub, the client is offline, or the Hub has a server error."""


@dataclass
class Repository:
    """A repository on the Hub at one revision.

    Attributes:
        revision: branch, tag, commit or `refs/pr/1`; default: `main`.
        token: default: that of `hf auth login` or HF_TOKEN.
        endpoint: URL of another Hub.
        call: what is being done, for messages.
        private: whether to create it as private; default: the account's setting.
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
        """The commit of the revision, with the sizes and hashes of its files, in one request."""
        return self.api.model_info(self.repo_id, revision=self.revision, files_metadata=True, timeout=READ_TIMEOUT)

    def ask(self, do: Callable[[], T], step: str = "", *, writing: bool = False, then: str = "") -> T:
        """Call `do`, and retry it after transient failures.

        Args:
            step: the step of the call, for messages.
            writing: whether it needs write access.
            then: the state after a failure and the next step, for messages.

        Raises:
            HubError: the call failed, and why; `Unanswered` if the Hub could not be reached.
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
                if pause is None or attempt == ATTEMPTS or time.monotonic() - begin + pause > TOTAL_WAIT:
                    raise self.refusal(error, step, writing=writing, then=then) from cause(error, self.token)
                why = reason(error, self.token).rstrip(".")
                logger.warning(f"{self.call}: {why}. Trying again in {pause:.0f} s.")
            time.sleep(pause)

    def refusal(self, error: BaseException, step: str = "", *, writing: bool = False, then: str = "") -> HubError:
        """The error for the caller: what was attempted, what is wrong, and what to do."""
        found, status, why = root(error), status_of(error), reason(error, self.token)
        name, where = self.repo_id, self.endpoint or constants.ENDPOINT
        known = self.token is not False and bool(self.token or get_token())
        login = "Log in with `hf auth login`, set HF_TOKEN, or pass token=."
        if isinstance(found, OfflineModeIsEnabled):
            what = "HF_HUB_OFFLINE is set. Unset it, or name a folder"
        elif isinstance(found, LocalTokenNotFoundError):
            what = f"there is no token. {login}"
        elif isinstance(found, HFValidationError):
            what = f"{name!r} is not a valid repository name ({str(found).splitlines()[0].rstrip('.')})"
        elif isinstance(found, GatedRepoError):
            what = f"{name} is gated. Ask for access at {where}/{name}. {'' if known else login}"
        elif isinstance(found, RevisionNotFoundError):
            what = f"{name} has no branch, tag or commit {self.revision or 'main'!r}. {self._revisions()}"
        elif writing and status == 403:
            what = f"the token may not write to {name} ({why}). Use a token with the role `write` of an account that "
            what += "owns it, or open a pull request with create_pr=True"
        elif isinstance(found, RepositoryNotFoundError) or status == 404:
            access = "the token has no access to it" if known else "there is no token"
            what = f"there is no model repository {name} at {where}, or it is private and {access}. Check the name. "
            what += "" if known else login
        elif status == 401:
            what = f"{why}: {'the token is not valid' if known else 'a token is needed'}. {login}"
        elif status == 403:
            what = f"the token gives no access to {name} ({why})"
        elif status is not None:
            wait = _retry_after(found)
            what = why + (f" and asks to wait {wait:.0f} s" if wait else "")
            what += ". Try again later" if status in TRANSIENT else ""
        elif isinstance(found, TRANSPORT):
            what = f"no answer came from {where} ({why}). Check the connection and try again"
        else:
            what = f"the answer from {where} cannot be used ({why}). Try again"
        opening = f"{self.call}, {step}" if step else self.call
        unanswered = (isinstance(found, TRANSPORT) and status is None) or (status or 0) >= 500
        return (Unanswered if unanswered else HubError)(f"{opening}: {what.strip().rstrip('.')}. {then}".strip())

    def _revisions(self) -> str:
        """The existing branches and tags, for a message."""
        try:
            with _limited():
                refs = self.api.list_repo_refs(self.repo_id)
        except Exception:  # it only adds to the message of another error
            return "Check the name."
        return f"It has {', '.join([ref.name for ref in (*refs.branches, *refs.tags)][:20])}."


def _pause(error: Exception, attempt: int) -> float | None:
    """Seconds to wait before another attempt; None if it should not be retried."""
    found, status = root(error), status_of(error)
    if status is not None and status not in TRANSIENT:
        return None
    if isinstance(found, NOT_ASKED) or type(found).__name__ in NEVER_SENT:
        return None
    if isinstance(found, OSError) and found.errno is not None and not isinstance(found, TRANSPORT):
        return None  # a local error, such as no space or no permission
    wait = _retry_after(found)
    if wait is not None:
        return wait if wait <= LONGEST_WAIT else None
    return float(min(2 ** (attempt - 1), LONGEST_WAIT))


def _retry_after(error: BaseException) -> float | None:
    """Seconds that the server asks to wait."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    found = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After") or "")
    found = found or re.search(r"\br=0\s*;\s*t=(\d+)", headers.get("ratelimit") or "")
    return float(found[1]) if found else None


_lock = threading.Lock()
_running = 0
_before: Any = None


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Within, the client shared by all threads has a read timeout, if it had none. Calls may overlap."""
    global _before, _running
    client = get_session()
    with _lock:
        _running += 1
        if client.timeout.read is None:
            _before, client.timeout = client.timeout, READ_TIMEOUT
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if _running == 0 and _before is not None:
                client.timeout, _before = _before, None


# Errors --------------------------------------------------------------------------------------------------------------


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes."""
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__ or at.__context__


def root(error: BaseException) -> BaseException:
    """The HTTP or connection error that caused an error; the error itself if there is none."""
    return next((found for found in _chain(error) if isinstance(found, TRANSPORT)), error)


def status_of(error: BaseException) -> int | None:
    """The HTTP status of the response to which an error belongs; None without a response."""
    status: int | None = getattr(getattr(root(error), "response", None), "status_code", None)
    return status


def is_unanswered(error: BaseException) -> bool:
    """Whether there was no answer from the Hub, so that another request would only wait again."""
    return isinstance(root(error), TRANSPORT) and status_of(error) is None


def scrub(text: str, token: str | bool | None = None) -> str:
    """A text with tokens replaced by `***`."""
    for secret in (token, get_token()):
        if isinstance(secret, str) and secret.strip():
            for written in (repr(secret)[1:-1], secret.strip()):  # the client quotes one that is invalid in a header
                text = text.replace(written, "***")
    return re.sub(r"\bhf_[A-Za-z0-9]{16,}", "***", text)


def reason(error: BaseException, token: str | bool | None = None) -> str:
    """What went wrong, in one line."""
    found, status = root(error), status_of(error)
    if status is not None:
        message = getattr(found, "server_message", None) or ""
        return scrub(f"the Hub answered {status}" + (f" ({message.splitlines()[0]})" if message else ""), token)
    first = (str(found).strip().splitlines() or [""])[0]
    return scrub(f"{type(found).__name__}: {first}" if first else type(found).__name__, token)


def cause(error: BaseException, token: str | bool | None) -> BaseException | None:
    """The error to show as the cause; None if its text, or that of one of its causes, contains a token."""
    return None if any(scrub(str(found), token) != str(found) for found in _chain(error)) else error
