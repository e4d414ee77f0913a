"""Talking to the Hub with patience: what passes is tried again, what does not becomes one error with the next step.

The client waits without end for an answer that never comes, and gives up at once on much that passes. Here each
attempt has a limit of time, and a call a limit of attempts. No error text ever holds a token.
"""

from __future__ import annotations

import contextlib
import email.utils
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from huggingface_hub import constants, get_session, get_token
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
FIRST_WAIT = 1.0
LONGEST_WAIT = 60.0
"""Seconds. A server that asks for more gets an error that says so."""
PATIENCE = 180.0
"""Seconds after which a call is not tried again."""
SILENCE = 60.0
"""Seconds without a byte after which an attempt counts as lost, where the client itself would wait for ever."""

PASSING = (408, 409, 412, 425, 429, 500, 502, 503, 504)
"""Answers that another attempt may change: somebody else's commit came between, too many requests, a busy server."""

NEVER_SENT = ("UnsupportedProtocol", "LocalProtocolError", "InvalidURL")
"""The client's errors of an endpoint or a token that no request can be made with."""

HTTPError: type[Exception] = next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
"""The base of the HTTP client's errors: huggingface_hub 1 uses httpx, 2 uses httpx2."""


def retried(call: str, do: Callable[[], T], *, token: str | bool | None = None, twice: bool = True) -> T:
    """Call `do`, again after a fault that passes.

    Args:
        call: what it is for, for the log.
        twice: whether it may be done again where the answer was lost, so that it may have been done.

    Raises:
        The last error as the client raised it: `explain` makes a message of it.
    """
    begin = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _limited():
                return do()
        except LoraError:
            raise
        except Exception as error:
            pause = _pause(error, attempt, twice)
            if pause is None or attempt == ATTEMPTS or time.monotonic() - begin + pause > PATIENCE:
                raise
            logger.warning(f"{call}: {reason(error, token).rstrip('.')}. Trying again in {pause:.0f} s.")
        time.sleep(pause)
    raise AssertionError


def root(error: BaseException) -> BaseException:
    """The HTTP or connection error that another one was made of; itself where there is none."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, (HTTPError, ConnectionError, TimeoutError)):
            return at
        at = at.__cause__ or at.__context__
    return error


def status_of(error: BaseException) -> int | None:
    """The status of the answer that an error is about; None where none came."""
    status: int | None = getattr(getattr(root(error), "response", None), "status_code", None)
    return status


def was_lost(error: BaseException) -> bool:
    """Whether no answer came, or none that can be read, so that what was asked for may have been done."""
    status = status_of(error)
    return status is None or status in (408, 500, 502, 504)


def never_arrived(error: BaseException) -> bool:
    """Whether there is no way to the Hub: no connection, or none is wanted."""
    found = root(error)
    return isinstance(found, OfflineModeIsEnabled) or (
        isinstance(found, (HTTPError, ConnectionError, TimeoutError)) and status_of(found) is None
    )


def _pause(error: Exception, attempt: int, twice: bool) -> float | None:
    """Seconds to wait before another attempt; None where there should be none."""
    found, status = root(error), status_of(error)
    if isinstance(found, OfflineModeIsEnabled) or (status is not None and status not in PASSING):
        return None
    if type(found).__name__ in NEVER_SENT:
        return None
    if not twice and was_lost(error):
        return None
    local = isinstance(found, OSError) and found.errno is not None
    if local and not isinstance(found, (HTTPError, ConnectionError, TimeoutError)):
        return None  # no space, no permission: this machine's own
    asked = _asked_for(found)
    if asked is not None:
        return asked if asked <= LONGEST_WAIT else None
    return float(min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT))


def _asked_for(error: BaseException) -> float | None:
    """Seconds that the server wants us to wait."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"\d+", value):
        return float(value)
    if value:
        with contextlib.suppress(ValueError, TypeError):
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    limit = re.search(r"\br=0\s*;\s*t=(\d+)", headers.get("ratelimit") or "")
    return float(limit[1]) if limit else None


_lock = threading.Lock()
_running = 0


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Give requests without a limit of time one, also in the client's other threads; several calls may run at once."""
    global _running
    client = get_session()
    with _lock:
        _running += 1
        hooks = client.event_hooks
        if _limit not in hooks["request"]:
            client.event_hooks = {**hooks, "request": [*hooks["request"], _limit]}
    try:
        yield
    finally:
        with _lock:
            _running -= 1


def _limit(request: Any) -> None:
    limits = request.extensions.get("timeout")
    if _running and isinstance(limits, dict):
        limits.update({kind: SILENCE for kind, value in limits.items() if value is None})


# Words -------------------------------------------------------------------------------------------------------------


def scrub(text: str, token: str | bool | None = None) -> str:
    """A text without tokens."""
    for secret in (token, get_token()):
        if isinstance(secret, str) and secret.strip():
            for form in (repr(secret)[1:-1], secret.strip()):  # the client quotes one that cannot stand in a header
                text = text.replace(form, "***")
    return re.sub(r"\bhf_[A-Za-z0-9]{8,}", "***", text)


def reason(error: BaseException, token: str | bool | None = None) -> str:
    """What went wrong, in a line."""
    found, status = root(error), status_of(error)
    if status is not None:
        message = getattr(found, "server_message", None) or ""
        said = f" ({message.splitlines()[0]})" if message else ""
        return scrub(f"the Hub answered {status}{said}", token)
    first = (str(found).strip().splitlines() or [""])[0]
    return scrub(f"{type(found).__name__}: {first}" if first else type(found).__name__, token)


def explain(
    error: BaseException,
    call: str,
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    writing: bool = False,
    then: str = "",
) -> HubError:
    """The error that a caller gets: what was asked, what is wrong, and what to do.

    Args:
        then: what holds after a failure, and how to go on.
    """
    found, status = root(error), status_of(error)
    where = endpoint or constants.ENDPOINT
    known = token or get_token()
    login = "Log in with `hf auth login`, set HF_TOKEN, or pass token=."
    if isinstance(found, OfflineModeIsEnabled):
        what = "the Hub is switched off by HF_HUB_OFFLINE. Unset it, or name a folder"
    elif isinstance(found, GatedRepoError):
        what = f"{repo_id} is gated. Ask for access at {where}/{repo_id}. {'' if known else login}"
    elif isinstance(found, RevisionNotFoundError):
        what = f"{repo_id} has no branch, tag or commit {revision or 'main'!r}"
    elif writing and status == 403:
        what = f"the token may not write to {repo_id} ({reason(found, token)}). Use one with the role `write`"
        what += " of an account that owns it, or open a pull request with create_pr=True"
    elif isinstance(found, RepositoryNotFoundError) or status == 404:
        access = "the token has no access to it" if known else "no token was given"
        what = f"there is no model repository {repo_id} at {where}, or it is private and {access}. Check the name. "
        what += "" if known else login
    elif status == 401:
        what = f"{reason(found, token)}: {'the token is not valid' if known else 'a token is needed'}. {login}"
    elif status == 403:
        what = f"the token gives no access to {repo_id} ({reason(found, token)})"
    elif status is not None:
        wait = _asked_for(found)
        what = reason(found, token) + (f" and asks to wait {wait:.0f} s" if wait else "")
        what += ". Try again later" if status in PASSING else ""
    elif never_arrived(error):
        what = f"no answer came from {where} ({reason(error, token)}). Check the connection and try again"
    else:
        what = f"the answer from {where} cannot be used ({reason(error, token)}). Try again"
    return HubError(" ".join(f"{call}: {what.strip().rstrip('.')}. {then}".split(" ")).strip())


def cause(error: BaseException, token: str | bool | None) -> BaseException | None:
    """The error to show as the cause; None where its text, or that of one behind it, holds a token."""
    at: BaseException | None = error
    while at is not None:
        if scrub(str(at), token) != str(at):
            return None
        at = at.__cause__ or at.__context__
    return error
