"""`hf-lora merge`, `convert` and `inspect`: commands for the files of adapters."""

from __future__ import annotations

from pathlib import Path

import typer

from .options import path
from .threads import threads_for_free_cores

SUBFOLDER = typer.Option(None, help="Folder within ADAPTER that holds the adapter.")
ADAPTER = typer.Argument(..., help="The adapter's folder or its name on the Hub.", show_default=False)


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
        help="ADAPTER with --out: load the model and merge. BASE ADAPTER OUT: merge file by file without loading the "
        "model. BASE and ADAPTER are folders or names on the Hub.",
    ),
    out: Path | None = typer.Option(
        None, parser=path, metavar="PATH", help="Folder for the full model.", show_default=False
    ),
    base: str | None = typer.Option(None, help="The base model; default: the one in the adapter's config."),
    dtype: str | None = typer.Option(None, help="float32, bfloat16 or float16; default: the base model's dtype."),
    untie: bool = typer.Option(False, "--untie", help="Untie an adapted layer whose weight is shared."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Write to a folder that is not empty."),
    revision: str | None = typer.Option(None, help="Branch, tag or commit of the adapter."),
    subfolder: str | None = SUBFOLDER,
    base_revision: str | None = typer.Option(
        None, help="Branch, tag or commit of the base model; default: the commit that the adapter was trained on."
    ),
    allow_other_base: bool = typer.Option(
        False, "--allow-other-base", help="Merge into a base other than the one that the adapter was trained on."
    ),
    quiet: bool = typer.Option(False, "--quiet", help="No progress bar (for merging without loading)."),
) -> None:
    """Merge an adapter into its base model and save the result.

    The folder gets a full model and its tokenizer.

    hf-lora merge ADAPTER --out OUT loads the adapter's base model in any format. hf-lora merge BASE ADAPTER OUT works
    on safetensors files and needs little memory; after an interruption, the same command continues.
    """
    target: str | Path
    if len(what) == 3 and out is None and base is None:
        base, adapter, target = what
    elif len(what) == 1 and out is not None:
        adapter, target = what[0], out
    else:
        raise typer.BadParameter("use hf-lora merge ADAPTER --out OUT [--base BASE] or hf-lora merge BASE ADAPTER OUT")
    with threads_for_free_cores():
        from ..export import merge_to_folder
        from ..pooled.build import is_pooled

    folder = merge_to_folder(
        adapter, target, base_model=base, in_memory=len(what) == 1, dtype=dtype, untie=untie, overwrite=overwrite,
        revision=revision, subfolder=subfolder, base_revision=base_revision, allow_other_base=allow_other_base,
        progress=not quiet,
    )  # fmt: skip
    loader = "hf_lora.build_classifier" if is_pooled(folder) else "transformers' from_pretrained"
    typer.echo(f"Merged. {folder} holds a full model: load it with {loader}.")


def convert(
    folder: Path = typer.Argument(..., parser=path, help="A folder with adapter_model.bin.", show_default=False),
    out: Path = typer.Option(
        ..., parser=path, metavar="PATH", help="Folder for the converted adapter.", show_default=False
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Write to a folder that is not empty."),
) -> None:
    """Convert an old .bin adapter to safetensors.

    The old file is a pickle; only tensors are read from it, and no code in it runs.
    """
    from ..files.convert import convert_adapter

    file = convert_adapter(folder, out, overwrite=overwrite)
    typer.echo(f"Converted {len(file.tensors)} tensors: {file.path}")


def inspect(
    adapter: str = ADAPTER,
    plot: Path | None = typer.Option(
        None, parser=path, metavar="PATH", help="Image file for a plot of each layer's update norm."
    ),
    revision: str | None = typer.Option(None, help="Branch, tag or commit of the adapter."),
    subfolder: str | None = SUBFOLDER,
) -> None:
    """Show the contents of an adapter file.

    A table of its layers with ranks, update norms and parameter counts, and the size of the file.
    """
    from ..export import inspect_adapter

    summary = inspect_adapter(adapter, revision=revision, subfolder=subfolder)
    typer.echo(str(summary))
    if plot is not None:
        typer.echo(f"plot: {summary.plot(plot)}")
