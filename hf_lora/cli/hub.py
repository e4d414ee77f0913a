"""`hf-lora push` and `pull`: adapters to and from the Hub, with the token of `hf auth login` or HF_TOKEN."""

from __future__ import annotations

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add this file's commands to `app`."""
    app.command()(push)
    app.command()(pull)


def push(
    folder: Path = typer.Argument(..., help="The adapter's folder.", show_default=False),
    repo: str = typer.Argument(..., help="The repository, such as user/adapter.", show_default=False),
    private: bool | None = typer.Option(
        None, "--private/--public", help="For a new repository; default: the account's setting.", show_default=False
    ),
    revision: str | None = typer.Option(None, help="Branch; a new one is made from main."),
    create_pr: bool = typer.Option(False, "--create-pr", help="Open a pull request."),
    message: str | None = typer.Option(None, "--message", "-m", help="Of the commit."),
    subfolder: str | None = typer.Option(None, help="Folder in the repository to push to."),
    tokenizer: bool = typer.Option(True, "--tokenizer/--no-tokenizer", help="Push a tokenizer that is there."),
) -> None:
    """Push an adapter to the Hub, in one commit.

    The adapter's own files go up, and nothing else in the folder.
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
        None, help="A new folder for the files; default: they stay in the cache.", show_default=False
    ),
    revision: str | None = typer.Option(None, help="Branch, tag, commit or refs/pr/1."),
    subfolder: str | None = typer.Option(None, help="Folder in the repository that holds the adapter."),
    offline: bool = typer.Option(False, "--offline", help="Take it from the cache and ask nothing."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Write into a folder that is not empty."),
) -> None:
    """Download an adapter from the Hub.

    All files are of one commit, and each has the hash that the Hub gives.
    """
    from ..hub import download

    found = download.pull(
        repo, folder, revision=revision, subfolder=subfolder, local_files_only=offline, overwrite=overwrite
    )
    typer.echo(f"Pulled: {found}")
