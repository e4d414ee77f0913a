"""Push the adapters of a model, with a card and, optionally the tokenizer."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from torch import nn

from ..files.format import CONFIG_NAME
from ..files.save import save_adapter, save_adapters
from .card.write import write_card
from .upload import push


def push_model(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    subfolder: str | None = None,
    adapter_name: str | None = None,
    tokenizer: Any = None,
    card: bool = True,
    tags: Sequence[str] | None = None,
    max_shard_size: Any = None,
) -> CommitInfo:
    """Push the adapters of a model as one commit.

    A single adapter, and one named "default", goes to the root of the repository; others go to folders with their
    names, as in `save_pretrained`.

    Args:
        repo_id, private, revision, create_pr, commit_message, commit_description, token, endpoint, subfolder: see
            `hub.upload.push`.
        adapter_name: push only this one, to the root.
        tokenizer: a tokenizer or processor to push with it.
        card: write README.md; text added by others on the Hub is kept.
        tags: additional tags for the card.
        max_shard_size: ignored; accepted because transformers' `push_to_hub` has it.

    Raises:
        AdapterFileError: a tensor is empty or not finite; no request was sent.
        HubError: the Hub rejected the push or could not be reached; the repository is unchanged, or has the whole
            commit.
    """
    with tempfile.TemporaryDirectory(prefix="hf_lora-") as folder:
        root = Path(folder)
        if adapter_name is None:
            save_adapters(model, root)
        else:
            save_adapter(model, root, adapter_name)
        if tokenizer is not None:
            tokenizer.save_pretrained(root)
        if card and (root / CONFIG_NAME).is_file():
            write_card(root, repo_id=repo_id, tags=tags)
        return push(
            root, repo_id, private=private, revision=revision, create_pr=create_pr, commit_message=commit_message,
            commit_description=commit_description, token=token, endpoint=endpoint, subfolder=subfolder,
            call=f"push_to_hub({repo_id!r})",
        )  # fmt: skip
