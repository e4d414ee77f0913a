"""The `hf-lora` application: registers the commands and reports errors."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..data.tables import is_unicode
from ..errors import LoraError
from ..versions import check_versions
from . import env, files, generate, hub, init, recommend, targets, train
from . import eval as eval_command
from .quiet import silence_imports
from .words import as_command

_NO_MEMORY = "can't allocate memory"
"""In the text of PyTorch's RuntimeError on a CPU."""
INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended, as in a shell."""


class _Commands(TyperGroup):
    """Prints an error in a few lines; a traceback only with `--debug`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        wrong = [word for word in args if not is_unicode(word)]
        if wrong:
            shown = ", ".join(map(repr, wrong[:5]))
            typer.echo(
                f"Error: {shown} is not valid UTF-8. Type it again, or set the encoding of the terminal.", err=True
            )
            raise typer.Exit(2)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            check_versions()
            if not ctx.params.get("debug"):
                silence_imports()
            return super().invoke(ctx)
        except KeyboardInterrupt as end:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(INTERRUPTED) from end
        except Exception as error:
            if ctx.params.get("debug") or _is_of_typer(error):
                raise
            command = f"hf-lora {ctx.invoked_subcommand}"
            typer.echo(f"Error: {self._message(ctx, error, command)}", err=True)
            raise typer.Exit(2 if isinstance(error, (LoraError, ImportError)) else 1) from error

    def _message(self, ctx: Any, error: Exception, command: str) -> str:
        if isinstance(error, LoraError):
            return as_command(str(error), command, self._options(ctx))
        text = (str(error).strip().splitlines() or [""])[0]
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY in text:
            return f"{command}: memory is exhausted ({text}). Smaller batches or shorter rows need less."
        what = f"{type(error).__name__}: {text}" if text else type(error).__name__
        if isinstance(error, ImportError):
            text = " ".join(str(error).split())
            return f"{command}: a package is missing ({text}). Install it, or omit the option that needs it."
        if isinstance(error, OSError):
            return f"{command}: {text or what}"
        return (
            f"{command} failed unexpectedly ({what}). `hf-lora --debug {ctx.invoked_subcommand} …` shows where; "
            "please report it with the output of `hf-lora env`."
        )

    def _options(self, ctx: Any) -> Iterator[str]:
        """The names of the options of the command that ran."""
        command: Any = self.get_command(ctx, ctx.invoked_subcommand or "")
        yield from (parameter.name for parameter in getattr(command, "params", ()))
        parsing = sys.modules.get("hf_lora.train.parsing")  # the other options of these, if they were read
        if parsing is not None and ctx.invoked_subcommand in ("train", "targets", "recommend"):
            yield from parsing.known_arguments()


def _is_of_typer(error: Exception) -> bool:
    """Whether Typer reports an exception itself: a wrong option, the end of a command, a closed pipe."""
    is_pipe = isinstance(error, OSError) and error.errno == errno.EPIPE
    return is_pipe or isinstance(error, typer.Abort) or hasattr(error, "exit_code")


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
targets.register(app)
recommend.register(app)
env.register(app)
init.register(app)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"hf-lora {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", callback=_print_version, is_eager=True
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error: hf-lora --debug COMMAND …"),
) -> None:
    pass


def main() -> None:
    """Run the command with `sys.argv`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # such as a pipe on Windows, whose encoding lacks most characters
            stream.reconfigure(errors="backslashreplace")
    app()
