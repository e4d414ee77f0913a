"""`hf-lora targets`: which layers of a model would be adapted."""

from __future__ import annotations

import typer

from .options import OTHER_ARGUMENTS


def register(app: typer.Typer) -> None:
    """Add this file's command to `app`."""
    app.command(context_settings=OTHER_ARGUMENTS)(targets)


def targets(
    ctx: typer.Context,
    model: str = typer.Argument(..., help="Folder or Hub name of a base model.", show_default=False),
    task: str | None = typer.Option(
        None, help="A task of hf-lora train; default: the class that the model's config names."
    ),
) -> None:
    """List the layers of a model that would be adapted, and those that would not.

    The weights are not loaded. The --lora options of `hf-lora train` apply: --lora-r 16, --lora-target-modules query.
    """
    from ..train.forecast import targets_of
    from ..train.parsing import parse_arguments

    own = [f"--model={model}", *([f"--task={task}"] if task is not None else [])]
    typer.echo(str(targets_of(parse_arguments([*own, *ctx.args]))))
