"""One card of two: the one here has the newer part of ours, the one on the Hub what somebody may have written there.

What a person wrote around our part counts where it was written last. Each push notes a hash of that text in the card,
so it is known whether it was changed on the Hub since, here since, or both.
"""

from __future__ import annotations

import hashlib

from transformers.utils import logging

from .readme import Readme, join_readme, split_readme

logger = logging.get_logger(__name__)
_NOTE = "outside"


def one_of_two(here: str, there: str, where: str) -> str:
    """The card to push.

    Args:
        here: the text of the file here. One without our marks was written by hand and is pushed as it is.
        there: the text on the Hub; empty where there is no file.
        where: names them in errors.

    Raises:
        AdapterFileError: one of them cannot be kept: broken metadata, or marks that are no pair.
    """
    mine = split_readme(here, f"{where}, here")
    body = _ours(here, mine)
    if body is None or here == there:
        return here
    theirs = split_readme(there, f"{where}, on the Hub")
    if not _is_blank(mine) and _text(mine) != _text(theirs):
        noted = theirs.record.get(_NOTE)
        if _is_blank(theirs) or _hash(theirs) == noted:
            theirs.before, theirs.after = mine.before, mine.after  # nobody has written there since
        elif _hash(mine) != noted:
            logger.warning(
                f"{where}: the text around the generated part differs here and on the Hub, where somebody changed it. "
                "That of the Hub is kept; edit it there, or pull it first."
            )
    record = {**{k: v for k, v in mine.record.items() if k != "metadata"}, _NOTE: _hash(theirs)}
    return join_readme(theirs, mine.metadata, body, record, where)


def _ours(content: str, readme: Readme) -> str | None:
    """Our part of a card without its marks; None where there is none."""
    rest = content.removeprefix("\ufeff")[len(readme.front or "") + len(readme.before) :]
    rest = rest[: len(rest) - len(readme.after)] if readme.after else rest
    lines = rest.splitlines()
    marked = len(lines) >= 2 and lines[0].startswith("<!-- hf_lora:begin") and "<!-- hf_lora:end" in lines[-1]
    return "\n".join(lines[1:-1]) if marked else None


def _is_blank(readme: Readme) -> bool:
    return not (readme.before.strip() or readme.after.strip())


def _text(readme: Readme) -> str:
    return f"{readme.before.strip()}\n\0{readme.after.strip()}".replace("\r\n", "\n")


def _hash(readme: Readme) -> str:
    return hashlib.sha256(_text(readme).encode()).hexdigest()[:16]
