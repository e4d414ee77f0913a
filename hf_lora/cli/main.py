"""The `hf-lora` application: registers the commands and reports errors."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import LoraError
from . import eval as eval_command
from . import files, generate, hub, train


class _Commands(TyperGroup):
    """Prints a LoraError without a traceback; other exceptions keep theirs."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LoraError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands,
    name="hf-lora",
    help="Train, use, share, merge, convert and inspect LoRA adapters of Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
train.register(app)
generate.register(app)
eval_command.register(app)
files.register(app)
hub.register(app)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"hf-lora {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", callback=_print_version, is_eager=True
    ),
) -> None:
    pass


def main() -> None:
    """Run the command with `sys.argv`."""
    app()
