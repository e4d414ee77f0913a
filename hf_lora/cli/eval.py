"""`hf-lora eval`: the metrics of a trained model on a file."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from .generate import (
    BASE_MODEL,
    BATCH_SIZE,
    DEVICE,
    DTYPE,
    MERGE,
    REVISION,
    SOURCE,
    SUBFOLDER,
    SYSTEM,
    progress_line,
)
from .options import path
from .threads import threads_for_free_cores


def register(app: typer.Typer) -> None:
    """Add this file's command to `app`."""
    app.command("eval")(eval_)


def eval_(
    source: str = SOURCE,
    file: str = typer.Option(..., help="CSV, TSV, JSON, JSONL, parquet; folder of images.", show_default=False),
    generate: bool = typer.Option(False, "--generate", help="Generate the answers and compare them."),
    predictions: Path | None = typer.Option(
        None, parser=path, metavar="PATH", help="JSONL file for the rows with the generated answers."
    ),
    limit: int | None = typer.Option(None, help="Number of rows, from the start of the file (default: all)."),
    text_column: str | None = typer.Option(None, help="Column of inputs (default: as in training, or by name)."),
    completion_column: str | None = typer.Option(None, help="Column of answers or labels (default: likewise)."),
    pair_column: str | None = typer.Option(None, help="Column of the second texts, or of contexts."),
    use_chat_template: bool | None = typer.Option(
        None,
        "--use-chat-template/--no-use-chat-template",
        help="Whether pairs of texts are turns of a chat.",
        show_default=False,
    ),
    last_turn_only: bool | None = typer.Option(
        None, "--last-turn-only/--all-turns", help="Turns of the assistant that are evaluated.", show_default=False
    ),
    max_length: int | None = typer.Option(
        None, help="Maximum tokens per row (default: as in training, else the model's context length)."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the metrics as JSON."),
    base_model: str | None = BASE_MODEL,
    merge: bool = MERGE,
    revision: str | None = REVISION,
    subfolder: str | None = SUBFOLDER,
    dtype: str | None = DTYPE,
    device: str | None = DEVICE,
    system: str | None = SYSTEM,
    max_new_tokens: int | None = typer.Option(None, help="Maximum tokens per generated answer (default: 256)."),
    batch_size: int = BATCH_SIZE,
) -> None:
    """Evaluate a trained model on a file.

    For a language model: perplexity and token accuracy over the answers; with --generate, the share of generated
    answers that are correct and, if they are JSON, the scores of their fields. For an encoder-decoder: its texts
    compared with those of the file. For other models: the metrics of their task, such as accuracy and F1.

    Rows become tokens as in training, which is recorded with the adapter. Options override that.
    """
    with threads_for_free_cores():
        from ..tasks.run import evaluate

    found = evaluate(
        source, file, generate=generate, predictions=predictions, limit=limit, text_column=text_column,
        completion_column=completion_column, pair_column=pair_column, use_chat_template=use_chat_template,
        last_turn_only=last_turn_only, max_length=max_length, system=system, max_new_tokens=max_new_tokens,
        batch_size=batch_size, progress=progress_line(), base_model=base_model, merge=merge, revision=revision,
        subfolder=subfolder, dtype=dtype, device=device,
    )  # fmt: skip
    if found.cut:
        typer.echo(f"{found.cut:,} rows are longer than the token limit and were truncated.", err=True)
    metrics = {"rows": found.rows, **found.metrics}
    if as_json:
        typer.echo(json.dumps(metrics | ({"fields": found.fields} if found.fields else {})))
        return
    typer.echo(_readable(metrics, found.fields))
    if predictions is not None:
        typer.echo(f"answers: {predictions}")


def _readable(metrics: dict[str, int | float], fields: dict[str, dict[str, float]]) -> str:
    lines = [f"{name}: {value:,{'.4g' if isinstance(value, float) else ''}}" for name, value in metrics.items()]
    if fields:
        width = max(len("field"), *map(len, fields))
        lines += ["", f"{'field':<{width}}  {'f1':>6}  {'precision':>9}  {'recall':>6}  {'count':>6}"]
    for name, s in fields.items():
        lines.append(
            f"{name:<{width}}  {s['f1']:>6.3f}  {s['precision']:>9.3f}  {s['recall']:>6.3f}  {s['count']:>6,}"
        )
    return "\n".join(lines)
