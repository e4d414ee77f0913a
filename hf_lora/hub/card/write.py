"""`README.md` of an adapter: what it is, how good it is, how it was made, and how to use it.

All numbers come from the adapter's files and the run's log; what is not known has no line. What a person writes
outside of our part of the file is kept (see readme.py). What a run told is kept in the file too, beside a hash of the
weights, so that a card written anew without the run still tells it, as long as the weights are the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from ...errors import AdapterFileError
from ...safe_io.atomic import replace_together
from ..names import CARD_NAME
from .card_data import Adapter, Run, is_repository, read_facts, scores_given, title
from .curve import draw_curve
from .escape import clean, code, text
from .readme import Readme, join_readme, split_readme
from .snippets import snippets_for

PICTURE_NAME = "training_loss.png"
TEMPLATE = Path(__file__).with_name("card_template.md.jinja")
LABELS_SHOWN = 30
TEXTS = ("base_model", "repo_id", "model_name", "license", "language", "task")
LISTS = ("tags", "datasets")
"""Arguments of `write_card` that hold until another value is given."""


def write_card(
    folder: str | os.PathLike[str],
    *,
    results: Mapping[str, Any] | Iterable[EvalResult] | None = None,
    data: str | None = None,
    history: Sequence[Mapping[str, Any]] | None = None,
    base_model: str | None = None,
    repo_id: str | None = None,
    model_name: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    tags: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
    task: str | None = None,
    run: Run | None = None,
    adapter: Adapter | None = None,
) -> Path:
    """Write the `README.md` of an adapter's folder, and a picture of its losses where matplotlib is there.

    Our part of it lies between two marks. Text outside of them, and metadata that somebody added or changed, are kept;
    a README without marks is kept whole and our part is put after it. Written twice, it has the same bytes.

    Args:
        folder: where the adapter lies.
        results: what was measured: a mapping of metrics to numbers, such as `trainer.evaluate()` returns, or
            `huggingface_hub.EvalResult`s.
        data: what a mapping of results was measured on, for people.
        history: `trainer.state.log_history`, for the picture.
        base_model: the base's name on the Hub, where the adapter was trained on a folder.
        repo_id: the adapter's name on the Hub, for the snippets; not given, they name the folder.
        model_name: the title; not given, that of the repository or folder.
        license: id of the adapter's license.
        language: code of the language, or several.
        tags: more of them.
        datasets: names on the Hub.
        task: the Hub's name of the task, where the model's class does not tell it.
        run: what is known of the training; `trainer.create_model_card()` fills it.
        adapter: what is known of the adapter, where it is not in `folder` yet.

    Returns:
        The file. What is None of the arguments from `base_model` to `task` stays as it was given before.

    Raises:
        AdapterFileError: the folder holds no adapter, or a README that cannot be kept (broken metadata, or marks that
            are no pair). Nothing was written.
    """
    path = Path(folder)
    facts = adapter or read_facts(path)
    file = path / CARD_NAME
    old = _read(file)
    given = _given(old, locals())
    known = run or _run_before(old, facts) or Run()
    if results is not None:
        known.scores = scores_given(results, data)
    writers: dict[str, Callable[[Path], Any]] = {}
    if history is not None:
        picture = draw_curve(history, known.unit)
        known.picture = picture is not None
        if picture is not None:
            writers[PICTURE_NAME] = lambda place: place.write_bytes(picture)
    elif known.picture:
        known.picture = (path / PICTURE_NAME).is_file()
    content = card_text(path, facts, known, given, old).encode()
    if not file.is_file() or file.read_bytes() != content:
        writers[CARD_NAME] = lambda place: place.write_bytes(content)
    if writers:
        path.mkdir(parents=True, exist_ok=True)
        replace_together(path, writers)
    return file


def card_text(folder: Path, facts: Adapter, run: Run, given: Mapping[str, Any], old: Readme) -> str:
    """The whole README: our part made anew, the rest from `old`."""
    config = facts.config
    local = config.base_model_name_or_path or (facts.extras.get("base") or {}).get("name")
    base = given.get("base_model") or local
    on_hub = is_repository(base) if given.get("base_model") else facts.base_is_on_hub
    repo_id = given.get("repo_id")
    source = repo_id or folder.resolve().name
    name = given.get("model_name") or source.rpartition("/")[2]
    task = given.get("task") or facts.task
    datasets = list(dict.fromkeys(d for d in [*(given.get("datasets") or []), *run.datasets] if is_repository(d)))
    labels = facts.labels
    if all(re.fullmatch(r"LABEL_\d+", str(label)) for label in labels):
        labels = []  # nobody has named them
    shown_base = clean(base) if on_hub else Path(str(base)).name if base else None
    body = _environment().from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=name, base=shown_base, base_link=shown_base if on_hub else None, task=task,
        datasets=datasets, layers=facts.layers, whole=facts.whole[:8],
        scores=run.scores, tells_data=any(s.data or s.dataset for s in run.scores),
        labels=labels[:LABELS_SHOWN], more_labels=max(0, len(labels) - LABELS_SHOWN),
        local=repo_id is None, adapter=source, picture=PICTURE_NAME if run.picture else None,
        snippets=snippets_for(folder, facts, source, shown_base, base == local and on_hub, task),
        rows=_rows(facts, run, shown_base), command=run.command, versions=list(_versions(facts, run).items()),
    )  # fmt: skip
    data = _metadata(facts, run, given, clean(base) if on_hub else None, name, task, datasets)
    record: dict[str, Any] = {"given": {k: v for k, v in given.items() if v is not None}, "run": run.to_json()}
    if facts.digest is not None:
        record["weights"] = facts.digest
    return join_readme(old, data, body, record, str(folder / CARD_NAME))


def _read(file: Path) -> Readme:
    if not file.is_file():
        return Readme()
    try:
        return split_readme(file.read_bytes().decode("utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise AdapterFileError(
            f"{file} is not UTF-8 ({error}). Nothing was written. Repair the file, or move it away and call again."
        ) from error


def _given(old: Readme, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `write_card` over those of earlier calls."""
    recorded = old.record.get("given")
    before: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    given: dict[str, Any] = {}
    for name in (*TEXTS, *LISTS):
        value = arguments[name] if arguments[name] is not None else before.get(name)
        if name in LISTS and isinstance(value, str):
            value = [value]
        if isinstance(value, list | tuple):
            given[name] = [clean(item) for item in value]
        elif value is not None:
            given[name] = clean(value)
        if name in TEXTS and name != "language" and isinstance(given.get(name), list):
            given[name] = " ".join(given[name])
    return given


def _run_before(old: Readme, facts: Adapter) -> Run | None:
    """What an earlier card told of the run, where it was of these weights."""
    same = facts.digest is not None and old.record.get("weights") == facts.digest
    return Run.from_json(old.record.get("run")) if same else None


def _metadata(
    facts: Adapter, run: Run, given: Mapping[str, Any], base: str | None, name: str, task: str | None,
    datasets: list[str],
) -> dict[str, Any]:  # fmt: skip
    """The YAML at the top of the file."""
    tags = ["lora", "hf_lora", *([f"base_model:adapter:{base}"] if base else []), *([task] if task else [])]
    final = [s for s in run.scores if s.step is None and isinstance(s.value, float)]
    metrics = [s.metric for s in run.scores if s.metric != "loss" and re.fullmatch(r"[\w./-]+", s.metric)]
    data = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name="peft",  # whose format it is: the Hub counts its downloads by it
        pipeline_tag=task,
        license=given.get("license"),
        language=given.get("language"),
        tags=list(dict.fromkeys([*tags, *(given.get("tags") or [])])),
        datasets=datasets or None,
        metrics=list(dict.fromkeys(metrics)) or None,
        model_name=clean(name),
        eval_results=[s.result(task or "other") for s in final] or None,
    )
    values = data.to_dict()
    first = ("base_model", "base_model_relation", "library_name", "pipeline_tag", "license", "language")
    return {key: values[key] for key in [*(k for k in first if k in values), *values] if key != "model_name"}


def _rows(facts: Adapter, run: Run, base: str | None) -> list[tuple[str, str]]:
    """The table of the configuration: (label, Markdown)."""
    config, identity = facts.config, facts.extras.get("base") or {}
    commit = identity.get("commit") or config.revision
    names = sorted({path.rpartition(".")[2] or path for path in facts.layers})
    kinds = ", ".join(code(name) for name in names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    rows = [
        ("Base model", f"{code(base)}{f' at {code(commit)}' if commit else ''}" if base else ""),
        ("Class", code(facts.extras.get("architecture") or "")),
        ("Rank r", _with_pattern(config.r, config.rank_pattern)),
        ("Alpha", _with_pattern(config.lora_alpha, config.alpha_pattern)),
        ("Scaling", "alpha / √r" if config.use_rslora else "alpha / r"),
        ("Method", "DoRA" if getattr(config, "use_dora", False) else ""),
        ("Dropout", f"{config.lora_dropout:g}"),
        ("Trained biases", code(config.bias) if config.bias != "none" else ""),
        ("Adapted layers", f"{len(facts.layers)}: {kinds}"),
        ("Trained whole", ", ".join(code(path) for path in facts.whole)),
        ("Parameters of the adapter", f"{facts.parameters:,}"),
        ("Its file", f"{facts.bytes:,} bytes" if facts.bytes else ""),
    ]
    rows += [(label, text(value)) for label, value in run.settings.items()]
    return [(label, value) for label, value in rows if value]


def _with_pattern(value: float | None, pattern: Mapping[str, float]) -> str:
    others = sorted(set(pattern.values()))
    if value is None:
        return ""
    return f"{value:g}" + (f"; other layers {', '.join(f'{v:g}' for v in others)}" if others else "")


def _versions(facts: Adapter, run: Run) -> dict[str, str]:
    saved = facts.extras.get("versions")
    saved = saved if isinstance(saved, dict) else {}
    return {str(name): str(version) for name, version in {**saved, **run.versions}.items()}


def _environment() -> Environment:
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False)
    environment.filters |= {"text": text, "code": code, "title": title, "number": _number}
    return environment


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
