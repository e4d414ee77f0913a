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
    base: str | None = typer.Option(None, help="The base model; not given: the one that the adapter names."),
    dtype: str | None = typer.Option(None, help="float32, bfloat16 or float16; not given: the base's own."),
    untie: bool = typer.Option(
        False, "--untie", help="Give an adapted layer with a shared weight its own. Only without loading."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Write into a folder that is not empty."),
    revision: str | None = typer.Option(None, help="Branch, tag or commit of the adapter."),
    subfolder: str | None = SUBFOLDER,
    base_revision: str | None = typer.Option(
        None, help="Branch, tag or commit of the base model; not given: the commit of the training."
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
    if len(what) == 3 and out is None and base is None:
        from ..file_merge.stream import merge_files
        from ..hub.base import local_base
        from ..hub.download import local_adapter

        adapter = local_adapter(what[1], revision, subfolder=subfolder)
        folder = merge_files(
            local_base(what[0], base_revision, adapter=adapter), adapter, what[2], dtype=dtype, untie=untie,
            overwrite=overwrite, allow_other_base=allow_other_base, progress=not quiet,
        )  # fmt: skip
    elif len(what) == 1 and out is not None and not untie:
        from ..export import merge_to_folder

        folder = merge_to_folder(
            what[0], out, base_model=base, dtype=dtype, overwrite=overwrite, revision=revision,
            subfolder=subfolder, base_revision=base_revision, allow_other_base=allow_other_base,
        )  # fmt: skip
    else:
        raise typer.BadParameter(
            "say hf-lora merge ADAPTER --out OUT [--base BASE], or hf-lora merge BASE ADAPTER OUT [--untie]"
        )
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
    subfolder: str | None = SUBFOLDER,
) -> None:
    """Show what an adapter's file holds.

    A table of its layers with ranks, norms of the updates and parameters, and the size of the file.
    """
    from ..files.inspect import inspect_adapter
    from ..hub.download import local_adapter

    summary = inspect_adapter(local_adapter(adapter, revision, subfolder=subfolder))
    typer.echo(str(summary))
    if plot is not None:
        typer.echo(f"drawn: {summary.plot(plot)}")
