"""`hf-lora push` and `pull`: upload and download adapters, with the token of `hf auth login` or HF_TOKEN."""

from __future__ import annotations

from pathlib import Path

import typer

from .options import path


def register(app: typer.Typer) -> None:
    """Add this file's commands to `app`."""
    app.command()(push)
    app.command()(pull)


def push(
    folder: Path = typer.Argument(..., parser=path, help="The adapter's folder.", show_default=False),
    repo: str = typer.Argument(..., help="The repository, such as user/adapter.", show_default=False),
    private: bool | None = typer.Option(
        None, "--private/--public", help="Visibility of a new repository; default: the account's.", show_default=False
    ),
    revision: str | None = typer.Option(None, help="Branch; created from main if it does not exist."),
    create_pr: bool = typer.Option(False, "--create-pr", help="Open a pull request."),
    message: str | None = typer.Option(None, "--message", "-m", help="Commit message."),
    subfolder: str | None = typer.Option(None, help="Folder within the repository to push to."),
    tokenizer: bool = typer.Option(True, "--tokenizer/--no-tokenizer", help="Push the folder's tokenizer, if any."),
) -> None:
    """Push an adapter to the Hub in one commit.

    Only the adapter's files are pushed; other files in the folder are not.
    """
    from ..hub import upload

    done = upload.push(
        folder, repo, private=private, revision=revision, create_pr=create_pr, commit_message=message,
        subfolder=subfolder, tokenizer=tokenizer,
    )  # fmt: skip
    typer.echo(f"Pushed: {done.pr_url or done.commit_url}")


def pull(
    repo: str = typer.Argument(..., help="The repository, such as user/adapter.", show_default=False),
    folder: Path | None = typer.Argument(
        None, parser=path, help="A new folder for the files; default: the cache.", show_default=False
    ),
    revision: str | None = typer.Option(None, help="Branch, tag, commit or refs/pr/1."),
    subfolder: str | None = typer.Option(None, help="Folder within the repository that holds the adapter."),
    offline: bool = typer.Option(False, "--offline", help="Use the cache, without network access."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Write to a folder that is not empty."),
) -> None:
    """Download an adapter from the Hub.

    All files come from one commit, and each is checked against the Hub's hash.
    """
    from ..hub import download

    found = download.pull(
        repo, folder, revision=revision, subfolder=subfolder, local_files_only=offline, overwrite=overwrite
    )
    typer.echo(f"Pulled: {found}")
