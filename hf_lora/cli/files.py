"""`hf-lora merge`, `convert` and `inspect`: what is done with an adapter's files."""

from __future__ import annotations

from pathlib import Path

import typer

ADAPTER = typer.Argument(..., help="The adapter's folder, or its name on the Hub.", show_default=False)


def register(app: typer.Typer) -> None:
    """Add this file's commands to `app`."""
    app.command()(merge)
    app.command()(convert)
    app.command()(inspect)


def merge(
    adapter: str = ADAPTER,
    out: Path = typer.Option(..., help="Folder for the full model.", show_default=False),
    base: str | None = typer.Option(None, help="The base model; not given: the one that the adapter names."),
    dtype: str | None = typer.Option(None, help="float32, bfloat16 or float16; not given: the base's own."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Write into a folder that is not empty."),
    revision: str | None = typer.Option(None, help="Branch, tag or commit of the adapter."),
    base_revision: str | None = typer.Option(None, help="Branch, tag or commit of the base model."),
    allow_other_base: bool = typer.Option(
        False, "--allow-other-base", help="Merge into another base than the adapter was trained on."
    ),
) -> None:
    """Save the base model with an adapter in it.

    The adapter is folded into the weights; the folder gets a full model and its tokenizer.
    """
    from ..export import merge_to_folder

    folder = merge_to_folder(
        adapter, out, base_model=base, dtype=dtype, overwrite=overwrite, revision=revision,
        base_revision=base_revision, allow_other_base=allow_other_base,
    )  # fmt: skip
    typer.echo(f"Merged. {folder} holds a full model: load it with transformers' from_pretrained.")


def convert(
    folder: Path = typer.Argument(..., help="A folder with adapter_model.bin.", show_default=False),
    out: Path = typer.Option(..., help="Folder for the adapter in today's format.", show_default=False),
    overwrite: bool = typer.Option(False, "--overwrite", help="Write into a folder that is not empty."),
) -> None:
    """Rewrite an old .bin adapter as safetensors.

    The old file is a pickle; it is read as tensors alone, and nothing in it is run.
    """
    from ..export import check_new_folder
    from ..files.format import convert_bin

    check_new_folder(out, overwrite)
    file = convert_bin(folder, out)
    typer.echo(f"Converted {len(file.tensors)} tensors: {file.path}")


def inspect(
    adapter: str = ADAPTER,
    plot: Path | None = typer.Option(None, help="Image to draw each layer's update norm in, such as norms.png."),
    revision: str | None = typer.Option(None, help="Branch, tag or commit of the adapter."),
) -> None:
    """Show what an adapter's file holds.

    A table of its layers with ranks, norms of the updates and parameters, and the size of the file.
    """
    from ..files.inspect import inspect_adapter
    from ..hub.pull import local_adapter

    summary = inspect_adapter(local_adapter(adapter, revision))
    typer.echo(str(summary))
    if plot is not None:
        typer.echo(f"drawn: {summary.plot(plot)}")
