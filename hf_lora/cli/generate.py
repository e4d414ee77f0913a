"""`hf-lora chat` and `generate`: using a trained language model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from ..errors import LoraError, nearest

SOURCE = typer.Argument(..., help="Folder or Hub name of an adapter, or of a full model.", show_default=False)
BASE_MODEL = typer.Option(None, help="The adapter's base model (default: the one that the adapter names).")
MERGE = typer.Option(False, "--merge", help="Fold the adapter into the weights first.")
REVISION = typer.Option(None, help="Branch, tag or commit of SOURCE.")
SUBFOLDER = typer.Option(None, help="Folder in SOURCE that holds the adapter.")
DTYPE = typer.Option(None, help="float32, bfloat16 or float16 (default: the checkpoint's).")
DEVICE = typer.Option(None, help="Such as cuda:1 (default: the accelerator if there is one).")
MAX_NEW_TOKENS = typer.Option(256, help="Most tokens of an answer.")
BATCH_SIZE = typer.Option(8, help="Prompts at a time.")
TEMPERATURE = typer.Option(0.0, help="0 takes the likeliest token; above it, tokens are drawn.")
TOP_P = typer.Option(1.0, help="Draw from the likeliest tokens that hold this share of the probability.")
SEED = typer.Option(None, help="For drawing.")
SYSTEM = typer.Option(None, help="System message of the chats that have none.")

HELP = """\
/base          the base model answers from now on
/adapter       the adapter answers again
/reset         forget what was said
/system TEXT   the system message; without a text, the template's own
/help          this list
/quit          leave, as do Ctrl-D and, at the prompt, Ctrl-C"""


def register(app: typer.Typer) -> None:
    """Add this file's commands to `app`."""
    app.command()(chat)
    app.command()(generate)


def chat(
    source: str = SOURCE,
    base_model: str | None = BASE_MODEL,
    merge: bool = MERGE,
    revision: str | None = REVISION,
    subfolder: str | None = SUBFOLDER,
    dtype: str | None = DTYPE,
    device: str | None = DEVICE,
    system: str | None = SYSTEM,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = TEMPERATURE,
    top_p: float = TOP_P,
    seed: int | None = SEED,
) -> None:
    """Talk with a trained model.

    Answers appear word by word, and the conversation is kept. /base and /adapter switch who answers.
    """
    from ..generate.conversation import Conversation
    from ..generate.loading import load_for_generation

    model, tokenizer = load_for_generation(
        source, base_model=base_model, merge=merge, revision=revision, subfolder=subfolder, dtype=dtype, device=device
    )
    conversation = Conversation(
        model, tokenizer, system=system, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    if conversation.adapter_in_use:
        kind = f"adapter {source} on {model.config._name_or_path}, not merged"
    else:
        kind = f"adapter {source}, merged" if merge else f"model {source}"
    typer.echo(
        f"{kind} ({model.dtype}, {model.device}). /help lists the commands, /quit leaves.".replace("torch.", "")
    )
    while (line := _ask()) is not None:
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return
        try:
            if word.startswith("/"):
                typer.echo(_command(conversation, word, rest.strip()))
            elif line:
                _answer(conversation, line)
        except LoraError as error:  # what does not fit is said, and the conversation goes on
            typer.echo(f"Error: {error}", err=True)


def _ask() -> str | None:
    """The next line that was typed, or None at the end. What comes through a pipe is shown, as if it were typed."""
    try:
        if sys.stdin.isatty():
            import readline  # noqa: F401  input then knows the arrow keys

            return input("> ").strip()
        line = sys.stdin.readline()
    except (EOFError, KeyboardInterrupt):
        line = ""
    if not line:
        typer.echo("")
        return None
    typer.echo(f"> {line.strip()}")
    return line.strip()


def _command(conversation: Any, word: str, rest: str) -> str:
    if word in ("/base", "/adapter"):
        conversation.use_adapter(word == "/adapter")
        return "The adapter answers." if word == "/adapter" else "The base model answers."
    if word == "/reset":
        conversation.reset()
        return "What was said is forgotten."
    if word == "/system":
        conversation.system = rest or None
        return f"The system message is: {rest}" if rest else "The system message is the template's own."
    if word == "/help":
        return HELP
    known = [line.split()[0] for line in HELP.splitlines()]
    return f"There is no command {word}{nearest(word, known)}. /help lists them."


def _answer(conversation: Any, text: str) -> None:
    before = conversation.forgotten
    try:
        conversation.say(text, lambda piece: typer.echo(piece, nl=False))
        typer.echo("")
    except KeyboardInterrupt:
        typer.echo(" … (stopped)")
    if conversation.forgotten > before:
        typer.echo(
            f"(The model's window is full: the oldest {conversation.forgotten - before} messages were left out.)"
        )


def generate(
    source: str = SOURCE,
    prompt: list[str] = typer.Option([], help="A prompt; may be given more than once.", show_default=False),
    file: Path | None = typer.Option(
        None, help="Prompts: a .txt file with one a line, or CSV, TSV, JSON, JSONL or parquet."
    ),
    out: Path | None = typer.Option(None, help="JSONL file for the rows with their answers (default: printed)."),
    column: str | None = typer.Option(None, help="Column of the prompts (default: found by name)."),
    base_model: str | None = BASE_MODEL,
    merge: bool = MERGE,
    revision: str | None = REVISION,
    subfolder: str | None = SUBFOLDER,
    dtype: str | None = DTYPE,
    device: str | None = DEVICE,
    system: str | None = SYSTEM,
    raw: bool = typer.Option(False, "--raw", help="Continue the prompts as they are, without the chat template."),
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    temperature: float = TEMPERATURE,
    top_p: float = TOP_P,
    seed: int | None = SEED,
    stop: list[str] = typer.Option([], help="An answer ends before this text.", show_default=False),
) -> None:
    """Let a trained model answer prompts.

    They are given here or in a file; the answers are printed or written to a JSONL file beside the columns they had.
    """
    from ..generate.texts import generate_answers

    answers = generate_answers(
        source, prompt or None, file=file, out=out, column=column, max_new_tokens=max_new_tokens,
        batch_size=batch_size, temperature=temperature, top_p=top_p, seed=seed, system=system,
        use_chat_template=False if raw else None, stop=stop, progress=progress_line(), base_model=base_model,
        merge=merge, revision=revision, subfolder=subfolder, dtype=dtype, device=device,
    )  # fmt: skip
    typer.echo("\n\n".join(answers) if out is None else f"{len(answers):,} answers: {out}")


def progress_line() -> Callable[[int, int], None] | None:
    """Shows on a terminal how many prompts are answered; None where there is none."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        if total > 1:
            typer.echo(f"\r{done:,} of {total:,}", err=True, nl=done == total)

    return show
