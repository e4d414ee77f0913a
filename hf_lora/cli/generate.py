"""`hf-lora chat` and `generate`: text generation with a trained language model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..errors import LoraError, nearest
from .options import path
from .threads import threads_for_free_cores

if TYPE_CHECKING:
    from ..generate.conversation import Conversation

SOURCE = typer.Argument(..., help="Folder or Hub name of an adapter or a full model.", show_default=False)
BASE_MODEL = typer.Option(None, help="The adapter's base model (default: the one in its config).")
MERGE = typer.Option(False, "--merge", help="Merge the adapter into the weights first.")
REVISION = typer.Option(None, help="Branch, tag or commit of SOURCE.")
SUBFOLDER = typer.Option(None, help="Folder within SOURCE that holds the adapter.")
DTYPE = typer.Option(None, help="float32, bfloat16 or float16 (default: the checkpoint's).")
DEVICE = typer.Option(None, help="Device, such as cuda:1 (default: the accelerator, if any).")
MAX_NEW_TOKENS = typer.Option(256, help="Maximum tokens per answer.")
BATCH_SIZE = typer.Option(8, help="Prompts per batch.")
TEMPERATURE = typer.Option(0.0, help="Sampling temperature; 0: greedy decoding.")
TOP_P = typer.Option(1.0, help="Sample from the most likely tokens whose total probability is this.")
SEED = typer.Option(None, help="Random seed for sampling.")
SYSTEM = typer.Option(None, help="System message for chats without one (default: as in training, if known).")

HELP = """\
/base          use the base model without the adapter
/adapter       use the adapter again
/reset         clear the conversation
/system TEXT   set the system message; without a text: the template's default
/help          show this list
/quit          quit; also Ctrl-D and, at the prompt, Ctrl-C"""


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
    """Chat with a trained model.

    Answers are streamed, and the conversation is kept. /base and /adapter turn the adapter off and on.
    """
    with threads_for_free_cores():
        from ..generate.conversation import Conversation
        from ..generate.loading import load_for_generation, recorded_format

    model, tokenizer = load_for_generation(
        source, base_model=base_model, merge=merge, revision=revision, subfolder=subfolder, dtype=dtype, device=device
    )
    # With --merge, the adapter is gone, and its record with it.
    trained = recorded_format(source, revision=revision, subfolder=subfolder) if merge else None
    conversation = Conversation(
        model, tokenizer, system=system, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        seed=seed, trained=trained,
    )  # fmt: skip
    if conversation.adapter_in_use:
        kind = f"adapter {source} on {model.config._name_or_path}, not merged"
    else:
        kind = f"adapter {source}, merged" if merge else f"model {source}"
    typer.echo(f"{kind} ({model.dtype}, {model.device}). /help lists the commands, /quit quits.".replace("torch.", ""))
    while (line := _read_line()) is not None:
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return
        try:
            if word.startswith("/"):
                typer.echo(_command(conversation, word, rest.strip()))
            elif line:
                _answer(conversation, line)
        except LoraError as error:  # the conversation continues
            typer.echo(f"Error: {error}", err=True)


def _read_line() -> str | None:
    """The next line of input, or None at the end. Lines from a pipe are echoed."""
    try:
        if sys.stdin.isatty():
            import readline  # noqa: F401  adds arrow keys and history to input()

            return input("> ").strip()
        line = sys.stdin.readline()
    except (EOFError, KeyboardInterrupt):
        line = ""
    if not line:
        typer.echo("")
        return None
    typer.echo(f"> {line.strip()}")
    return line.strip()


def _command(conversation: Conversation, word: str, rest: str) -> str:
    if word in ("/base", "/adapter"):
        conversation.use_adapter(word == "/adapter")
        return "Using the adapter." if word == "/adapter" else "Using the base model."
    if word == "/reset":
        conversation.reset()
        return "The conversation is cleared."
    if word == "/system":
        conversation.system = rest or None
        return f"The system message is: {rest}" if rest else "The system message is the template's default."
    if word == "/help":
        return HELP
    known = [line.split()[0] for line in HELP.splitlines()]
    return f"Unknown command {word}{nearest(word, known)}. /help lists the commands."


def _answer(conversation: Conversation, text: str) -> None:
    before = conversation.forgotten
    try:
        conversation.say(text, lambda piece: typer.echo(piece, nl=False))
        typer.echo("")
    except KeyboardInterrupt:
        typer.echo(" … (stopped)")
    if conversation.forgotten > before:
        typer.echo(
            f"(The model's context is full: the oldest {conversation.forgotten - before} messages were left out.)"
        )


def generate(
    source: str = SOURCE,
    prompt: list[str] = typer.Option([], help="A prompt; can be repeated.", show_default=False),
    file: Path | None = typer.Option(
        None,
        parser=path,
        metavar="PATH",
        help="File of prompts: .txt with one per line, or CSV, TSV, JSON, JSONL or parquet.",
    ),
    out: Path | None = typer.Option(
        None, parser=path, metavar="PATH", help="JSONL file for the rows with answers (default: print them)."
    ),
    column: str | None = typer.Option(None, help="Column of prompts (default: found by name)."),
    base_model: str | None = BASE_MODEL,
    merge: bool = MERGE,
    revision: str | None = REVISION,
    subfolder: str | None = SUBFOLDER,
    dtype: str | None = DTYPE,
    device: str | None = DEVICE,
    system: str | None = SYSTEM,
    use_chat_template: bool | None = typer.Option(
        None,
        "--use-chat-template/--raw",
        help="Apply the chat template to prompts, or continue them as they are (default: as in training, if known, "
        "else the template if there is one).",
        show_default=False,
    ),
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    temperature: float = TEMPERATURE,
    top_p: float = TOP_P,
    seed: int | None = SEED,
    stop: list[str] = typer.Option([], help="Stop an answer before this text; can be repeated.", show_default=False),
) -> None:
    """Generate answers to prompts.

    Prompts come from the command line or a file. Answers are printed, or written with the file's columns as JSONL.
    """
    with threads_for_free_cores():
        from ..generate.texts import generate_answers

    answers = generate_answers(
        source, prompt or None, file=file, out=out, column=column, max_new_tokens=max_new_tokens,
        batch_size=batch_size, temperature=temperature, top_p=top_p, seed=seed, system=system,
        use_chat_template=use_chat_template, stop=stop, progress=progress_line(), base_model=base_model,
        merge=merge, revision=revision, subfolder=subfolder, dtype=dtype, device=device,
    )  # fmt: skip
    typer.echo("\n\n".join(answers) if out is None else f"{len(answers):,} answers: {out}")


def progress_line() -> Callable[[int, int], None] | None:
    """A function that shows progress on the terminal; None if stderr is not a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        if total > 1:
            typer.echo(f"\r{done:,} of {total:,}", err=True, nl=done == total)

    return show
