"""`hf-lora init`: a commented YAML file for `hf-lora train`."""

from __future__ import annotations

from pathlib import Path

import typer

from ..errors import ConfigError
from .options import path


def register(app: typer.Typer) -> None:
    """Add this file's command to `app`."""
    app.command()(init)


def init(
    task: str = typer.Argument(..., help="A task of hf-lora train, such as text-classification.", show_default=False),
    file: Path = typer.Argument(Path("run.yaml"), parser=path, help="The file to write."),
    model: str | None = typer.Option(None, help="Base model to write into it.", show_default=False),
) -> None:
    """Write a commented YAML file for a task, to change and run with hf-lora train --config FILE."""
    from ..train.template import template

    text = template(task, model)
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError as error:
        raise ConfigError(f"hf-lora init: {file} exists. Name another file.") from error
    except OSError as error:
        if file.is_file():  # a part of it
            file.unlink()
        raise ConfigError(f"hf-lora init: {file} cannot be written ({error.strerror}). Name another file.") from error
    typer.echo(f"Wrote {file}. Change it, then run: hf-lora train --config {file}")
