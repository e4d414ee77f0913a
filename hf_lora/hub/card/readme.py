"""A README with one generated part, which is replaced at each write; the rest is kept unchanged.

The generated text is between two markers. The second marker also stores the generated metadata, to distinguish an
author's change from an older generated value. Metadata that an author added or changed are kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index, model_index_to_eval_results
from transformers.utils import logging

from ...errors import AdapterFileError

logger = logging.get_logger(__name__)

BEGIN = "<!-- hf_lora:begin. From here to the other mark hf_lora writes; all else is kept. -->"
_MARKER = re.compile(r"^<!-- hf_lora:(begin|end)\b(.*)-->[ \t]*(?=\r?$)", re.MULTILINE)
INDEX = "model-index"
NOTHING = "\n\0"
"""The value of `outside` without any text of the author."""
REPAIR = "Nothing was written. Repair the file, or move it away and call again."

Metadata = dict[str, Any]


@dataclass
class Readme:
    """The parts of a README. Without markers, all text is in `before`.

    Attributes:
        front: the source text of the metadata, with the lines around them.
        ours: the text between the markers; None without markers.
        record: the data stored by the last write; empty if it cannot be read.
    """

    metadata: Metadata = field(default_factory=dict)
    front: str = ""
    before: str = ""
    ours: str | None = None
    after: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    newline: str = "\n"

    @property
    def outside(self) -> str:
        """The text of the author."""
        return f"{self.before.strip()}{NOTHING}{self.after.strip()}".replace("\r\n", "\n")


def split_readme(content: str, where: str) -> Readme:
    """The parts of a README.

    Raises:
        AdapterFileError: its metadata are not a YAML mapping, or its markers are not one begin and one end.
    """
    readme = Readme(newline="\r\n" if "\r\n" in content else "\n")
    content = content.removeprefix("\ufeff")
    match = REGEX_YAML_BLOCK.search(content)
    if match:
        readme.front, content = match[0], content[match.end() :]
        try:
            metadata = yaml.safe_load(match[2])
        except yaml.YAMLError as error:
            raise AdapterFileError(f"{where}: its metadata are not valid YAML ({error}). {REPAIR}") from error
        if not isinstance(metadata or {}, dict):
            raise AdapterFileError(f"{where}: its metadata are not a mapping of names to values. {REPAIR}")
        readme.metadata = metadata or {}
    markers = list(_MARKER.finditer(content))
    readme.before = content
    if not markers:
        return readme
    if [marker[1] for marker in markers] != ["begin", "end"]:
        raise AdapterFileError(
            f"{where}: the markers around the generated part must be one begin and one end, but are "
            f"{', '.join(marker[1] for marker in markers)}. {REPAIR}"
        )
    begin, end = markers
    readme.before, readme.after = content[: begin.start()], content[end.end() :]
    readme.ours = content[begin.end() : end.start()].replace("\r\n", "\n")
    try:
        record = json.loads(end[2])
    except (ValueError, RecursionError):
        return readme
    readme.record = record if isinstance(record, dict) else {}
    return readme


def join_readme(old: Readme, metadata: Metadata, body: str, record: Mapping[str, Any], where: str) -> str:
    """The README with a new generated part; `record` is returned by `split_readme`.

    Raises:
        AdapterFileError: an existing `model-index` cannot be read.
    """
    was = old.record.get("metadata")
    merged, written = _merge(old.metadata, metadata, was if isinstance(was, dict) else {}, where)
    front = old.front
    if not front or merged != old.metadata:
        dumped = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True, width=100)
        front = f"---\n{dumped.strip()}\n---\n".replace("\n", old.newline)
    kept = json.dumps({**record, "metadata": written}).replace("--", "-\\u002d").replace(">", "\\u003e")
    ours = f"{BEGIN}\n{body.strip()}\n<!-- hf_lora:end {kept} -->".replace("\n", old.newline)
    if old.ours is not None:
        return front + old.before + ours + old.after
    text = old.before.rstrip("\r\n")
    return front + old.before + old.newline * (2 if text == old.before and text else 1) + ours + old.newline


def _merge(old: Metadata, ours: Metadata, was: Metadata, where: str) -> tuple[Metadata, Metadata]:
    """(the metadata to write, the generated part of them, to record).

    A list has the generated items that the author did not remove, then those that the author added. A single value is
    the author's if there is one.
    """
    merged, written = dict(old), dict[str, Any]()
    for key in {**was, **ours}:
        if key == INDEX:
            merged[key], written[key] = _merge_results(old.get(key), ours.get(key), _listed(was.get(key)), where)
            continue
        mine, last, theirs = _listed(ours.get(key)), _listed(was.get(key)), _listed(old.get(key))
        kept = [item for item in mine if item in theirs or item not in last]
        kept += [item for item in theirs if item not in mine and item not in last]
        several = isinstance(ours.get(key), list) or isinstance(old.get(key), list)
        merged[key] = kept if several else kept[-1] if kept else None
        written[key] = [item for item in mine if item in last or item not in theirs]
    merged = {k: v for k, v in merged.items() if v not in (None, []) or (k in old and old[k] == v)}
    return merged, {key: items for key, items in written.items() if items}


def _merge_results(there: Any, now: Any, before: list[Any], where: str) -> tuple[Any, list[str]]:
    """(the model index, with results of others after the generated ones; the hashes of the generated ones)."""
    try:
        name, present = model_index_to_eval_results(there) if there else ("", [])
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"{where}: its {INDEX} cannot be read ({error!r}). {REPAIR}") from error
    name, ours = model_index_to_eval_results(now) if now else (name, [])
    others = [result for result in present if _mark(result) not in before]
    others = [result for result in others if not any(result.is_equal_except_value(own) for own in ours)]
    if not ours and others == present:
        return there, []
    results = [*ours, *others]
    return eval_results_to_model_index(name, results) if results else None, [_mark(result) for result in ours]


def _mark(result: EvalResult) -> str:
    return _hash(json.dumps(asdict(result), sort_keys=True, default=str))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _listed(value: object) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def card_to_push(here: str, there: str, where: str) -> str:
    """The card to push: the local generated part, and the text around it from where it changed since the last push.

    Args:
        here: the text of the local file. Without markers it was written by hand and is pushed unchanged.
        there: the text on the Hub; empty if there is no file.
        where: their name in errors.

    Raises:
        AdapterFileError: one of them has malformed metadata or markers.
    """
    mine = split_readme(here, f"{where}, local")
    if mine.ours is None or here == there:
        return here
    theirs = split_readme(there, f"{where}, on the Hub")
    pushed = theirs.record.get("outside")  # the hash of the author's text when both were equal
    if mine.outside not in (NOTHING, theirs.outside):
        if theirs.outside == NOTHING or _hash(theirs.outside) == pushed:  # not edited there since
            theirs.before, theirs.ours, theirs.after = mine.before, mine.ours, mine.after
        elif _hash(mine.outside) != pushed:
            logger.warning(
                f"{where}: the text around the generated part was changed on the Hub and differs from the local one. "
                "The text on the Hub is kept; edit it there, or pull it first."
            )
    record = {**mine.record, "outside": _hash(mine.outside) if mine.outside == theirs.outside else pushed}
    return join_readme(theirs, mine.metadata, mine.ours, record, where)
