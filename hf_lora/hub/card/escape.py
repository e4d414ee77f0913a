"""Escape untrusted names for a card: as Markdown, as code, or as a command line.

In Markdown, characters that could be markup become numeric entities. Home directories and secrets are always removed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..network import scrub

HIDDEN = "***"
_SECRETS = re.compile(
    r"\b(?:api_org_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|xox[a-z]-[\w-]{10,}|AKIA[A-Z0-9]{16})|(?<=://)[^/\s@]+(?=@)"
)
_HOMES = re.compile(r"(?:[A-Za-z]:[\\/]Users[\\/]|/home/|/Users/)[^/\\\s\"']+|/root(?=/|$)")
_SECRET_NAME = (
    r"(?!(?:[\w-]*[-_])?(?:bos|cls|eos|mask|pad|sep|unk)[-_]token)(?:[\w-]*[-_])?"
    r"(?:token|secret|passw(?:or)?d|pwd|credentials?|auth|authorization|bearer|signature|(?:\w+[-_])?key)"
)
_SECRET_FLAG = re.compile(rf"--?{_SECRET_NAME}", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(_SECRET_NAME, re.IGNORECASE)
"""The name in `NAME=value`, as a word of its own."""
_SECRET_QUERY = re.compile(rf"(?<=[?&])({_SECRET_NAME})=[^&\s\"']+", re.IGNORECASE)
"""An argument of a URL."""
_MARKUP = re.compile(r"""[!"#$&'*:;<>?@\[\\\]^`{|}~]|(?<![^\W_])_|_(?![^\W_])""")
"""ASCII characters that may be markup; parentheses are not, without square brackets."""
_PLAIN_CODE = re.compile(r"[\w./=+@:, -]*\w")
_NOTEBOOKS = ("ipykernel_launcher.py", "colab_kernel_launcher.py")


def clean(value: object) -> str:
    """One line without control characters, lone surrogates, secrets and home directories."""
    line = "".join(c if c.isprintable() or c == " " else " " for c in str(value))
    line = _SECRETS.sub(HIDDEN, scrub(line.encode("utf-8", "replace").decode("utf-8")))
    line = _SECRET_QUERY.sub(rf"\1={HIDDEN}", line)
    home = str(Path.home())
    if len(home) > 1:
        line = re.sub(re.escape(home) + r"(?=$|[/\\\s\"',:;])", "~", line)
    return _HOMES.sub("~", line).strip()


def text(value: object) -> str:
    """A value as literal Markdown text, also for a table cell."""
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", clean(value))


def code(value: object) -> str:
    """A value in a code span; `<code>` with entities if backticks do not work in a table."""
    line = clean(value)
    if not line or _PLAIN_CODE.fullmatch(line):
        return f"`{line}`" if line else ""
    return "<code>" + re.sub(r"[^A-Za-z0-9 ]", lambda match: f"&#{ord(match[0])};", line) + "</code>"


def literal(value: object) -> str:
    """A string as a Python literal on one line."""
    return json.dumps(clean(value))


def command_line(argv: Sequence[str], original: Sequence[str] = (), processes: int = 1) -> str | None:
    """The command that started this program, as one shell line; None in a notebook or an interactive session.

    Paths below the working directory become relative, others lose their folders; values of flags such as `--hub_token`
    are hidden.

    Args:
        argv: `sys.argv`.
        original: `sys.orig_argv`, to recognize `python -m module`.
        processes: number of processes of the program.
    """
    program, *words = argv or [""]
    if program in ("", "-", "-c") or Path(program).name in _NOTEBOOKS:
        return None
    start = ["torchrun", "--nproc-per-node", str(processes)] if processes > 1 else ["python"]
    module = _module(original)
    if module is not None:
        head = [*start, "-m", module]
    elif program.endswith(".py"):
        head = [*start, _short(program)]
    else:  # the command of an installed package
        head = [*start, "--no-python", Path(program).name] if processes > 1 else [Path(program).name]
    shown, hides = list[str](), False
    for word in words:
        name, equals, _ = word.partition("=")
        if hides and not word.startswith("--"):
            shown.append(HIDDEN)
            hides = False
            continue
        secret = _SECRET_FLAG.fullmatch(name) is not None or (
            equals == "=" and _SECRET_VARIABLE.fullmatch(name) is not None
        )
        hides = secret and not equals
        shown.append(f"{name}={HIDDEN}" if secret and equals else _short(word))
    return shlex.join([*head, *(clean(word) for word in shown)])


def _module(original: Sequence[str]) -> str | None:
    """The module after `-m` if Python was started with it."""
    words = list(original)[1:]
    while words and words[0].startswith("-"):
        if words[0] == "-m":
            return words[1] if len(words) > 1 else None
        words = words[2:] if words[0] in ("-W", "-X") else words[1:]
    return None


def _short(word: str) -> str:
    """A word of a command line; absolute paths outside the working directory lose their folders."""
    name, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    here = os.getcwd()
    if os.path.isabs(value):
        below = value == here or value.startswith(here + os.sep)
        value = os.path.relpath(value, here) if below else Path(value).name
    elif len(here) > 1:
        value = value.replace(here + os.sep, "")
    return f"{name}{equals}{value}"
