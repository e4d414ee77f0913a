"""`hf-lora recommend`: the settings that a run would choose, with reasons."""

from __future__ import annotations

import json

import typer

from .options import OTHER_ARGUMENTS, refuse_repeated
from .threads import threads_for_free_cores


def register(app: typer.Typer) -> None:
    """Add this file's command to `app`."""
    app.command(context_settings=OTHER_ARGUMENTS)(recommend)


def recommend(
    ctx: typer.Context,
    model: str = typer.Argument(..., help="Folder or Hub name of a base model.", show_default=False),
    data: str = typer.Argument(
        ..., help="File of training rows, folder of images, or name of a data set.", show_default=False
    ),
    task: str | None = typer.Option(None, help="A task of hf-lora train; default: from the columns."),
    as_json: bool = typer.Option(False, "--json", help="Print the recommendation as JSON."),
) -> None:
    """Recommend settings for a model and data: those that hf-lora train chooses, each with its reason.

    The weights are not loaded. The options of `hf-lora train` apply: --label-column category, --max-steps 500.
    """
    options = {"--model": "the first argument", **dict.fromkeys(("--train-file", "--dataset"), "the second argument")}
    refuse_repeated("recommend", ctx.args, options)
    with threads_for_free_cores():
        from ..train.advice import advise, arguments_for
        from ..train.parsing import parse_arguments

    found = advise(parse_arguments(ctx.args, arguments_for(model, data, task)))
    typer.echo(json.dumps(found.to_dict()) if as_json else str(found))
