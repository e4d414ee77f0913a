"""A README of which one part is ours: written anew each time, while the rest stays as its author left it.

Our part of the text stands between two marks. Of the metadata at the top, ours is what we wrote last time; a record of
that, in the second mark, tells the author's changes from our own old values: what an author added, changed or took out
stays so.

Of two cards, the one here has the newer part of ours, the one on the Hub what somebody may have written there. Text of
a person counts where it was written last. Each push notes a hash of it in the card, so it is known whether it was
changed on the Hub since, here since, or both.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils._fixes import yaml_dump
from transformers.utils import logging

from ...errors import AdapterFileError

logger = logging.get_logger(__name__)

BEGIN = "<!-- hf_lora:begin. From here to the other mark hf_lora writes; all else is kept. -->"
_BEGIN = re.compile(r"^<!-- hf_lora:begin\b.*-->[ \t]*(?=\r?$)", re.MULTILINE)
_END = re.compile(r"^<!-- hf_lora:end\b(.*)-->[ \t]*(?=\r?$)", re.MULTILINE)
INDEX = "model-index"
_NOTE = "outside"
"""Where the record keeps the hash of what is not ours."""
REPAIR = "Nothing was written. Repair the file, or move it away and call again."

Metadata = dict[str, Any]


@dataclass
class Readme:
    """A README in its parts. Of one without marks, all text comes before the part that is ours."""

    metadata: Metadata = field(default_factory=dict)
    front: str | None = None
    """The metadata as they were written, with the lines around them."""
    before: str = ""
    after: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    """What we wrote down last time; empty where there is nothing, or nothing that can be read."""
    marked: bool = False
    newline: str = "\n"


def split_readme(content: str, where: str) -> Readme:
    """The parts of a README.

    Raises:
        AdapterFileError: its metadata are no YAML mapping, or its marks are not one pair in their order.
    """
    readme = Readme(newline="\r\n" if "\r\n" in content else "\n")
    content = content.removeprefix("\ufeff")
    match = REGEX_YAML_BLOCK.search(content)
    if match:
        readme.front, content = match[0], content[match.end() :]
        try:
            metadata = yaml.safe_load(match[2])
        except yaml.YAMLError as error:
            raise AdapterFileError(f"{where}: its metadata are no YAML ({error}). {REPAIR}") from error
        if not isinstance(metadata or {}, dict):
            raise AdapterFileError(f"{where}: its metadata are no mapping of names to values. {REPAIR}")
        readme.metadata = metadata or {}
    begins, ends = list(_BEGIN.finditer(content)), list(_END.finditer(content))
    if not begins and not ends:
        readme.before = content
        return readme
    if len(begins) != 1 or len(ends) != 1 or begins[0].start() > ends[0].start():
        raise AdapterFileError(
            f"{where}: the marks around the part that hf_lora writes are not one pair ({len(begins)} at its begin, "
            f"{len(ends)} at its end). {REPAIR}"
        )
    readme.marked = True
    readme.before, readme.after = content[: begins[0].start()], content[ends[0].end() :]
    try:
        record = json.loads(ends[0][1])
    except (ValueError, RecursionError):
        record = {}
    readme.record = record if isinstance(record, dict) else {}
    return readme


def join_readme(old: Readme, metadata: Metadata, body: str, record: Mapping[str, Any], where: str) -> str:
    """The README with another part of ours; `record` comes back from `split_readme`.

    Raises:
        AdapterFileError: a `model-index` that somebody else wrote cannot be read.
    """
    merged, written = _merge(old, metadata, where)
    front = old.front
    if front is None or merged != old.metadata:
        dumped: str = yaml_dump(merged, sort_keys=False, width=100, line_break="\n")
        front = f"---\n{dumped.strip()}\n---\n".replace("\n", old.newline)
    kept = json.dumps({**record, "metadata": written}).replace("--", "-\\u002d").replace(">", "\\u003e")
    ours = f"{BEGIN}\n{body.strip()}\n<!-- hf_lora:end {kept} -->".replace("\n", old.newline)
    between = ""
    if not old.marked:
        ends = len(old.before) - len(old.before.rstrip("\r\n"))
        between = old.newline * max(0, 2 - ends // len(old.newline)) if old.before.strip() else old.newline
    return front + old.before + between + ours + (old.after if old.marked else old.newline)


def _merge(old: Readme, metadata: Metadata, where: str) -> tuple[Metadata, Metadata]:
    """(the metadata to write, the record of what of them is ours): a merge of three."""
    last = old.record.get("metadata")
    last = last if isinstance(last, dict) else {}
    merged = dict(old.metadata)
    written: Metadata = {}
    for key in list(dict.fromkeys([*last, *metadata])):
        if key == INDEX:
            continue
        now, before, there = metadata.get(key), last.get(key), old.metadata.get(key)
        if isinstance(now, list) or isinstance(before, list):
            value: Any = _merge_lists(_listed(now), _listed(before), _listed(there))
        elif key in last and there == before:
            value = now  # nobody has touched it
        elif key in last or there is not None:
            value = there  # an author changed it, took it out, or wrote it first
        else:
            value = now
        if isinstance(now, list):
            written[key] = [item for item in now if item in _listed(before) or item not in _listed(there)]
        elif now is not None and (key in last or there is None):
            written[key] = now  # and not what an author had written before us
        if value is None or (value == [] and there != []):
            merged.pop(key, None)
        else:
            merged[key] = value
    index, written_results = _merge_results(old, metadata.get(INDEX), _listed(last.get(INDEX)), where)
    merged.pop(INDEX, None)
    if index:
        merged[INDEX] = index
    if written_results:
        written[INDEX] = written_results
    return merged, written


def _merge_lists(now: list[Any], before: list[Any], there: list[Any]) -> list[Any]:
    """Ours but for what an author took out, then what an author added."""
    ours = [item for item in now if not (item in before and item not in there)]
    return ours + [item for item in there if item not in before and item not in ours]


def _merge_results(old: Readme, now: Any, before: list[Any], where: str) -> tuple[Any, list[str]]:
    """(the model index with results of others kept, the marks of our results)."""
    there = old.metadata.get(INDEX)
    if not there and not now:
        return None, []
    try:
        name, present = model_index_to_eval_results(there) if there else ("", [])
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"{where}: its {INDEX} cannot be read ({error!r}). {REPAIR}") from error
    others = [result for result in present if _mark(result) not in before]
    ours: list[EvalResult] = []
    if now:
        name, ours = model_index_to_eval_results(now)
    others = [result for result in others if not any(result.is_equal_except_value(own) for own in ours)]
    if not ours and others == present:
        return there, []
    results = [*ours, *others]
    return eval_results_to_model_index(name, results) if results else None, [_mark(result) for result in ours]


def _mark(result: EvalResult) -> str:
    text = json.dumps(asdict(result), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


# Here and on the Hub -------------------------------------------------------------------------------------------------


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
