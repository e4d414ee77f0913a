"""The model card (`README.md`) of an adapter: what it is, its results, how it was trained, and how to use it.

All numbers come from the adapter's files and the log of the run; unknown facts are omitted. Text outside the generated
part of the file is kept (see readme.py). The facts about the run are also stored in the file, with a hash of the
weights: a card that is written again without the run keeps them as long as the weights are the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from ...adapt.labels import AUTO_CLASSES
from ...errors import AdapterFileError
from ...safe_io.atomic import replace_together
from ..names import CARD_NAME
from .card_data import Adapter, Run, is_repository, read_facts, scores_given, title
from .curve import draw_curve
from .escape import clean, code, literal, text
from .readme import REPAIR, Readme, join_readme, split_readme

PICTURE_NAME = "training_loss.png"
TEMPLATE = Path(__file__).with_name("card_template.md.jinja")
TEXTS = ("base_model", "repo_id", "model_name", "license", "task")
LISTS = ("tags", "datasets", "language")
"""Arguments of `write_card` that are kept until they are changed."""
PIPELINE_INPUTS = {
    "text-classification": "A text to classify.",
    "token-classification": "A text with names in it.",
    "text-generation": "The beginning of a text",
}
"""Tasks of `pipeline` with one text as input -> an example input."""


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
    """Write the `README.md` of an adapter's folder, and a plot of its losses if matplotlib is installed.

    The generated part is between two markers. Text outside of them, and metadata that were added or changed by hand,
    are kept; a README without markers is kept, and the generated part is appended. Writing twice gives the same bytes.

    Args:
        folder: the adapter's folder.
        results: a mapping of metrics to numbers, such as `trainer.evaluate()` returns, or
            `huggingface_hub.EvalResult`s.
        data: description of the evaluation data of a mapping of results.
        history: `trainer.state.log_history`, for the plot.
        base_model: name of the base on the Hub, if the adapter was trained on a local folder.
        repo_id: the adapter's name on the Hub, for the snippets. Default: they name the folder.
        model_name: the title. Default: that of the repository or folder.
        license: id of the adapter's license.
        language: a language code, or several.
        tags: additional tags.
        datasets: names on the Hub.
        task: name of the task on the Hub. Default: that of the model's class.
        run: facts about the training, from `trainer.create_model_card()`.
        adapter: facts about the adapter, if it is not in `folder` yet.

    Returns:
        The file. Arguments from `base_model` to `task` that are None keep the value of the previous call.

    Raises:
        AdapterFileError: the folder has no adapter, or a README with malformed metadata or markers. Nothing was
            written.
    """
    path, arguments = Path(folder), locals()
    facts = adapter or read_facts(path)
    file = path / CARD_NAME
    old = _read(file)
    given = _given(old, {name: arguments[name] for name in (*TEXTS, *LISTS)})
    known = run or _run_before(old, facts) or Run()
    if results is not None:
        known.scores = scores_given(results, data)
    writers: dict[str, Callable[[Path], object]] = {}
    if history is not None:
        picture = draw_curve(history, known.unit)
        known.picture = picture is not None
        if picture is not None:
            writers[PICTURE_NAME] = lambda place: place.write_bytes(picture)
    elif known.picture:
        known.picture = (path / PICTURE_NAME).is_file()
    content = _card_text(path, facts, known.cleaned(), given, old).encode()
    if not file.is_file() or file.read_bytes() != content:
        writers[CARD_NAME] = lambda place: place.write_bytes(content)
    if writers:
        path.mkdir(parents=True, exist_ok=True)
        replace_together(path, writers)
    return file


def _read(file: Path) -> Readme:
    try:
        return split_readme(file.read_bytes().decode("utf-8"), str(file)) if file.is_file() else Readme()
    except UnicodeDecodeError as error:
        raise AdapterFileError(f"{file} is not UTF-8 ({error}). {REPAIR}") from error


def _given(old: Readme, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `write_card`, with those of earlier calls as defaults."""
    before, given = old.record.get("given"), dict[str, Any]()
    for name, value in arguments.items():
        if value is None and isinstance(before, dict):
            value = before.get(name)
        if value is not None:
            items = [clean(item) for item in ([value] if isinstance(value, str) else value)]
            given[name] = items if name in LISTS else " ".join(items)
    return given


def _run_before(old: Readme, facts: Adapter) -> Run | None:
    """The facts about the run in an earlier card, if it was for the same weights."""
    same = facts.digest is not None and old.record.get("weights") == facts.digest
    return Run.from_json(old.record.get("run")) if same else None


def _card_text(folder: Path, facts: Adapter, run: Run, given: Mapping[str, Any], old: Readme) -> str:
    """The whole README: a new generated part, the rest from `old`."""
    local = facts.config.base_model_name_or_path or (facts.extras.get("base") or {}).get("name")
    base = given.get("base_model") or local
    on_hub = is_repository(base) if given.get("base_model") else facts.base_is_on_hub
    shown = clean(base) if on_hub else Path(str(base)).name if base else None
    adapter = given.get("repo_id") or folder.resolve().name
    name = given.get("model_name") or adapter.rpartition("/")[2]
    task = given.get("task") or facts.task
    datasets = list(dict.fromkeys(d for d in [*given.get("datasets", []), *run.datasets] if is_repository(d)))
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False)
    environment.filters |= {"text": text, "code": code, "literal": literal, "title": title, "number": _number}
    body = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=name, base=shown, base_on_hub=on_hub, task=task, datasets=datasets, facts=facts, scores=run.scores,
        shows_data=any(s.data or s.dataset for s in run.scores), labels=facts.labels, adapter=adapter,
        repo_id=given.get("repo_id"), picture=PICTURE_NAME if run.picture else None, command=run.command,
        rows=_rows(facts, run, shown), versions={**facts.versions, **run.versions},
        **_snippets(folder, facts, adapter, shown, base == local and on_hub, task),
    )  # fmt: skip
    data = _metadata(facts, run, given, clean(base) if on_hub else None, name, task, datasets)
    record: dict[str, Any] = {"given": given, "run": run.to_json()}
    if facts.digest is not None:
        record["weights"] = facts.digest
    return join_readme(old, data, body, record, str(folder / CARD_NAME))


def _snippets(
    folder: Path, facts: Adapter, adapter: str, base: str | None, base_is_found: bool, task: str | None
) -> dict[str, Any]:
    """Variables of the template for the snippets: arguments as source code, and which snippets to show.

    Args:
        base_is_found: whether the adapter's configuration names the base, so that the snippet does not need to.
    """
    import transformers

    architecture, labels = facts.architecture, facts.extras.get("num_labels")
    commit = (facts.extras.get("base") or {}).get("commit")
    of_transformers = architecture.isidentifier() and hasattr(transformers, architecture)
    plain_module = facts.config.task_type is None and not of_transformers
    tokenizer = not plain_module and (folder / "tokenizer_config.json").is_file()
    auto = AUTO_CLASSES.get(facts.config.task_type or "", architecture)
    where = "model" if plain_module else literal(base) if base else None
    pooled = isinstance(facts.extras.get("pooling"), dict)
    load_base = [literal(base)]
    if isinstance(labels, int) and "Classification" in auto:
        load_base.append(f"labels={labels}{_pooling(facts)}" if pooled else f"num_labels={labels}")
    if isinstance(commit, str):
        load_base.append(f"revision={literal(commit)}")
    call = "build_classifier" if pooled else f"{auto}.from_pretrained"
    return {
        "plain_module": plain_module, "tokenizer": tokenizer, "pooled": pooled,
        "base_name": auto, "base_call": f"{call}({', '.join(load_base)})",
        "load": literal(adapter) + ("" if base_is_found or where is None else f", base_model={where}"),
        "pipeline_input": PIPELINE_INPUTS.get(task or "") if tokenizer else None,
    }  # fmt: skip


def _pooling(facts: Adapter) -> str:
    """The argument of `build_classifier` for a pooling that was chosen by name; a declared one is found again."""
    pooling = facts.extras["pooling"]
    by_name = len(pooling["modes"]) == 1 and not pooling["dense"] and not pooling["normalize"]
    return f", pooling={literal(pooling['modes'][0])}" if by_name else ""


def _metadata(
    facts: Adapter, run: Run, given: Mapping[str, Any], base: str | None, name: str, task: str | None,
    datasets: list[str],
) -> dict[str, Any]:  # fmt: skip
    """The YAML at the top of the file."""
    tags = [
        "lora",
        "hf_lora",
        "transformers",
        *([f"base_model:adapter:{base}"] if base else []),
        *([task] if task else []),
    ]
    metrics = {s.metric: None for s in run.scores if s.metric != "loss" and re.fullmatch(r"[\w./-]+", s.metric)}
    final = [s.result(task or "other") for s in run.scores if s.step is None and isinstance(s.value, float)]
    languages = given.get("language", [])
    data = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name="peft",  # the format is PEFT's, and the Hub counts downloads by this name
        pipeline_tag=task,
        license=given.get("license"),
        language=languages[0] if len(languages) == 1 else languages or None,
        tags=[*tags, *given.get("tags", [])],
        datasets=datasets or None,
        metrics=list(metrics) or None,
        model_name=clean(name),
        eval_results=final or None,
    ).to_dict()
    data.pop("model_name", None)
    first = ("base_model", "base_model_relation", "library_name", "pipeline_tag", "license", "language")
    return {key: data[key] for key in dict.fromkeys([*first, *data]) if key in data}


def _rows(facts: Adapter, run: Run, base: str | None) -> list[tuple[str, str]]:
    """The table of the configuration: (label, Markdown)."""
    config = facts.config
    commit = (facts.extras.get("base") or {}).get("commit") or config.revision
    names = sorted({path.rpartition(".")[2] or path for path in facts.layers})
    kinds = ", ".join(code(name) for name in names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    rows = [
        ("Base model", f"{code(base)}{f' at {code(commit)}' if commit else ''}" if base else ""),
        ("Class", code(facts.architecture)),
        ("Rank r", _with_pattern(config.r, config.rank_pattern)),
        ("Alpha", _with_pattern(config.lora_alpha, config.alpha_pattern)),
        ("Scaling", "alpha / √r" if config.use_rslora else "alpha / r"),
        ("Method", code(config.method) if config.method != "lora" else ""),
        ("Dropout", f"{config.lora_dropout:g}"),
        ("Trained biases", code(config.bias) if config.bias != "none" else ""),
        ("Adapted layers", f"{len(facts.layers)}: {kinds}"),
        ("Fully trained", ", ".join(code(path) for path in facts.whole)),
        ("Parameters of the adapter", f"{facts.parameters:,}"),
        ("File size", f"{facts.bytes:,} bytes" if facts.bytes else ""),
        *((label, text(value)) for label, value in run.settings.items()),
    ]
    return [(label, value) for label, value in rows if value]


def _with_pattern(value: float | None, pattern: Mapping[str, float]) -> str:
    others = ", ".join(f"{other:g}" for other in sorted(set(pattern.values())))
    return "" if value is None else f"{value:g}" + (f"; other layers {others}" if others else "")


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
