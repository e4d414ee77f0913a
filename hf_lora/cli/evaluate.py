"""`hf-lora eval`: how good a trained model is on a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from ..errors import ConfigError
from .generate import (
    BASE_MODEL,
    BATCH_SIZE,
    DEVICE,
    DTYPE,
    MAX_NEW_TOKENS,
    MERGE,
    REVISION,
    SOURCE,
    SUBFOLDER,
    SYSTEM,
    counter,
)


def register(app: typer.Typer) -> None:
    """Add this file's command to `app`."""
    app.command("eval")(evaluate)


def evaluate(
    source: str = SOURCE,
    file: str = typer.Option(..., help="CSV, TSV, JSON, JSONL or parquet file.", show_default=False),
    generate: bool = typer.Option(False, "--generate", help="Let the model write the answers, and compare them."),
    predictions: Path | None = typer.Option(None, help="JSONL file for the rows with the written answers."),
    limit: int | None = typer.Option(None, help="Rows to take from the file's beginning; not given: all."),
    text_column: str | None = typer.Option(None, help="Column of the texts, or prompts; not given: found by name."),
    completion_column: str | None = typer.Option(None, help="Column of the answers; not given: found by name."),
    max_length: int | None = typer.Option(None, help="Tokens kept of a row; not given: the model's window."),
    as_json: bool = typer.Option(False, "--json", help="Print the metrics as JSON."),
    base_model: str | None = BASE_MODEL,
    merge: bool = MERGE,
    revision: str | None = REVISION,
    subfolder: str | None = SUBFOLDER,
    dtype: str | None = DTYPE,
    device: str | None = DEVICE,
    system: str | None = SYSTEM,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
) -> None:
    """Measure a trained model on a file.

    A language model's perplexity and token accuracy over the answers; with --generate, how many of the answers that it
    writes are right, and where they are JSON, how many of their fields. A classifier's accuracy and F1.
    """
    if not generate and (predictions is not None or system is not None):
        raise ConfigError("hf-lora eval: --predictions and --system belong to --generate. Add it, or leave them out.")
    if batch_size < 1:
        raise ConfigError(f"hf-lora eval: --batch-size {batch_size} must be at least 1.")
    from ..data.chat import chat_rows
    from ..data.formats import recognise
    from ..data.prompts import check_output, write_answers
    from ..data.tables import read_table
    from ..evaluation.run import first_rows, score_answers, score_classes, score_rows
    from ..generate.texts import load_for_generation, window_of

    table = first_rows(read_table(file), limit)
    if predictions is not None:
        check_output(predictions, table)
    model, tokenizer = load_for_generation(
        source, base_model=base_model, merge=merge, revision=revision, subfolder=subfolder, dtype=dtype,
        device=device, any_task=not generate,
    )  # fmt: skip
    fields: dict[str, dict[str, float]] = {}
    if not model.can_generate():
        metrics = score_classes(model, tokenizer, table, batch_size)
    elif generate:
        form = recognise(table, text_column, completion_column)
        answers = score_answers(
            model, tokenizer, table, form, max_new_tokens=max_new_tokens, batch_size=batch_size, system=system,
            progress=counter(len(table)),
        )  # fmt: skip
        metrics, fields = answers.metrics, answers.fields
        if predictions is not None:
            write_answers(table, answers.texts, predictions)
    else:
        form = recognise(table, text_column, completion_column)
        rows, cut = chat_rows(table, form, tokenizer, max_length or window_of(model) or 2**31)
        if cut:
            typer.echo(f"{cut:,} rows are longer than the limit of tokens and lost their end.", err=True)
        metrics = score_rows(model, rows, batch_size)
    metrics = {"rows": len(table), **metrics}
    typer.echo(json.dumps(metrics | ({"fields": fields} if fields else {})) if as_json else _readable(metrics, fields))
    if predictions is not None and not as_json:
        typer.echo(f"the answers: {predictions}")


def _readable(metrics: dict[str, Any], fields: dict[str, dict[str, float]]) -> str:
    lines = [f"{name}: {value:,{'.4g' if isinstance(value, float) else ''}}" for name, value in metrics.items()]
    if fields:
        width = max(len("field"), *map(len, fields))
        lines += ["", f"{'field':<{width}}  {'f1':>6}  {'precision':>9}  {'recall':>6}  {'count':>6}"]
    for name, s in fields.items():
        lines.append(
            f"{name:<{width}}  {s['f1']:>6.3f}  {s['precision']:>9.3f}  {s['recall']:>6.3f}  {s['count']:>6,}"
        )
    return "\n".join(lines)
