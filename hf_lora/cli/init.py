"""`hf-lora init`: a commented YAML file for `hf-lora train`."""

from __future__ import annotations

from pathlib import Path

import typer

from ..errors import ConfigError
from .options import OTHER_ARGUMENTS, path, refuse_repeated
from .threads import threads_for_free_cores


def register(app: typer.Typer) -> None:
    """Add this file's command to `app`."""
    app.command(context_settings=OTHER_ARGUMENTS)(init)


def init(
    ctx: typer.Context,
    task: str = typer.Argument(..., help="A task of hf-lora train, such as text-classification.", show_default=False),
    file: Path = typer.Argument(Path("run.yaml"), parser=path, help="The file to write."),
    model: str | None = typer.Option(None, help="Base model to write into it.", show_default=False),
    data: str | None = typer.Option(
        None, help="Data as for recommend: write down the settings that are recommended.", show_default=False
    ),
) -> None:
    """Write a commented YAML file for a task, to change and run with hf-lora train --config FILE.

    With --model and --data, it holds the settings that `hf-lora recommend` prints, and the options of `hf-lora train`
    apply: --label-column category.
    """
    options = {"--task": "the first argument", **dict.fromkeys(("--train-file", "--dataset"), "the option --data")}
    refuse_repeated("init", ctx.args, options)
    with threads_for_free_cores():
        from ..train.advice import advise, arguments_for
        from ..train.parsing import parse_arguments
        from ..train.template import template, template_of

    if data is None:
        if ctx.args:
            raise ConfigError(f"hf-lora init: {' '.join(ctx.args)}: these options apply to --data, which is missing.")
        text = template(task, model)
    elif model is None:
        raise ConfigError("hf-lora init: --data needs --model: the settings depend on both.")
    else:
        text = template_of(advise(parse_arguments(ctx.args, arguments_for(model, data, task))))
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
