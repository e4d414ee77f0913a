"""`hf-lora merge`, `convert` and `inspect`: what is done with an adapter's files."""

from __future__ import annotations

from pathlib import Path

import typer

SUBFOLDER = typer.Option(None, help="Folder in ADAPTER that holds it.")
ADAPTER = typer.Argument(..., help="The adapter's folder, or its name on the Hub.", show_default=False)


def register(app: typer.Typer) -> None:
    """Add this file's commands to `app`."""
    app.command()(merge)
    app.command()(convert)
    app.command()(inspect)


def merge(
    what: list[str] = typer.Argument(
        ...,
        metavar="[BASE] ADAPTER [OUT]",
        show_default=False,
        help="ADAPTER alone, with --out: the model is loaded. BASE ADAPTER OUT: merged file by file, without loading. "
        "BASE and ADAPTER are folders, or names on the Hub.",
    ),
    out: Path | None = typer.Option(None, help="Folder for the full model.", show_default=False),
    base: str | None = typer.Option(None, help="The base model; default: the one that the adapter names."),
    dtype: str | None = typer.Option(None, help="float32, bfloat16 or float16; default: the base's own."),
    untie: bool = typer.Option(False, "--untie", help="Give an adapted layer with a shared weight its own."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Write into a folder that is not empty."),
    revision: str | None = typer.Option(None, help="Branch, tag or commit of the adapter."),
    subfolder: str | None = SUBFOLDER,
    base_revision: str | None = typer.Option(
        None, help="Branch, tag or commit of the base model; default: the commit that the adapter was trained on."
    ),
    allow_other_base: bool = typer.Option(
        False, "--allow-other-base", help="Merge into another base than the adapter was trained on."
    ),
    quiet: bool = typer.Option(False, "--quiet", help="No progress bar. Only without loading."),
) -> None:
    """Save the base model with an adapter in it.

    The adapter is folded into the weights; the folder gets a full model and its tokenizer.

    hf-lora merge ADAPTER --out OUT loads the base that the adapter names, whatever form it has. hf-lora merge BASE
    ADAPTER OUT works on safetensors files and needs little memory; cut off, the same command goes on.
    """
    target: str | Path
    if len(what) == 3 and out is None and base is None:
        base, adapter, target = what
    elif len(what) == 1 and out is not None:
        adapter, target = what[0], out
    else:
        raise typer.BadParameter(
            "say hf-lora merge ADAPTER --out OUT [--base BASE], or hf-lora merge BASE ADAPTER OUT"
        )
    from ..export import merge_to_folder

    folder = merge_to_folder(
        adapter, target, base_model=base, in_memory=len(what) == 1, dtype=dtype, untie=untie, overwrite=overwrite,
        revision=revision, subfolder=subfolder, base_revision=base_revision, allow_other_base=allow_other_base,
        progress=not quiet,
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
    from ..files.convert import convert_adapter

    file = convert_adapter(folder, out, overwrite=overwrite)
    typer.echo(f"Converted {len(file.tensors)} tensors: {file.path}")


def inspect(
    adapter: str = ADAPTER,
    plot: Path | None = typer.Option(None, help="Image to draw each layer's update norm in, such as norms.png."),
    revision: str | None = typer.Option(None, help="Branch, tag or commit of the adapter."),
    subfolder: str | None = SUBFOLDER,
) -> None:
    """Show what an adapter's file holds.

    A table of its layers with ranks, norms of the updates and parameters, and the size of the file.
    """
    from ..export import inspect_adapter

    summary = inspect_adapter(adapter, revision=revision, subfolder=subfolder)
    typer.echo(str(summary))
    if plot is not None:
        typer.echo(f"drawn: {summary.plot(plot)}")
