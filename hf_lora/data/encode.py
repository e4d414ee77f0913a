"""From prompts to tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DataError, Faults
from .trained import TrainedFormat

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a chat: mappings with `role` and `content`."""


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    system: str | None = None,
    use_chat_template: bool | None = None,
    window: int | None = None,
    continued: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """The tokens of each prompt, including the generation prompt of the chat template.

    Args:
        variables: further variables of the chat template.
        continued: the answer continues the prompt, so an EOS that the tokenizer adds to a text is removed. False for
            encoder-decoders.

    Raises:
        ConfigError: a chat template is needed, and the tokenizer has none.
        DataError: lists every prompt that is empty, not a chat, or longer than `window`.
    """
    template = tokenizer.chat_template is not None
    chats = system is not None or any(not isinstance(prompt, str) for prompt in prompts)
    if not template and (use_chat_template or chats):
        raise ConfigError(
            "The tokenizer has no chat template, but messages, a system message and use_chat_template=True need one. "
            "Pass the prompts as plain texts, or set tokenizer.chat_template to the one used in training."
        )
    if use_chat_template is False and chats:
        raise ConfigError(
            "use_chat_template=False is for plain texts; messages and a system message need the template. Omit one of "
            "them."
        )
    faults = Faults("The prompts")
    encoded = []
    for i, prompt in enumerate(prompts):
        ids: list[int] = []
        try:
            if use_chat_template is False or not template:
                ids = _raw_ids(tokenizer, str(prompt), continued)
            else:
                ids = _chat_ids(tokenizer, prompt, system, variables or {})
            if window is not None and len(ids) >= window:
                raise DataError(
                    f"has {len(ids):,} tokens; the model's context window has {window:,}, including the answer"
                )
        except DataError as error:
            faults.add(f"prompt {i} {error}")
        encoded.append(ids)
    faults.check(DataError, "Nothing was generated. Shorten or correct these; prompts count from 0.")
    return encoded


def knows_no_text(tokenizer: Any) -> bool:
    """Whether a tokenizer has no vocabulary: transformers makes such a one for a folder without the files of one."""
    return len(tokenizer) - len(set(tokenizer.all_special_tokens)) < 2  # some have a mark of spaces


def as_in_training(
    trained: TrainedFormat | None,
    prompts: Sequence[Prompt],
    system: str | None = None,
    use_chat_template: bool | None = None,
) -> tuple[Sequence[Prompt], str | None, bool | None]:
    """The first arguments of `encode_prompts`, with those that are not given as in the training of the adapter."""
    texts = all(isinstance(prompt, str) for prompt in prompts)
    if trained is None:
        return prompts, system, use_chat_template
    if use_chat_template is None and texts and trained.source_prefix:
        prompts = [f"{trained.source_prefix}{prompt}" for prompt in prompts]
    if use_chat_template is None and system is None and texts and trained.use_chat_template is False:
        return [f"{prompt}{trained.separator or ''}" for prompt in prompts], None, False
    if use_chat_template is None and texts:
        use_chat_template = trained.use_chat_template or None
    if system is None and use_chat_template is not False:
        system = trained.system
    return prompts, system, use_chat_template


def with_system(messages: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    """The messages, after a system message if one is given and they have none."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _raw_ids(tokenizer: PreTrainedTokenizerBase, text: str, continued: bool) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    adds_end = ids[-1:] == [tokenizer.eos_token_id] != plain[-1:]  # as some tokenizers do with every text
    if len(ids) == adds_end:
        raise DataError("is empty")
    return ids[:-1] if continued and adds_end else ids


def _chat_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, system: str | None, variables: Mapping[str, Any]
) -> list[int]:
    from jinja2 import TemplateError

    messages: list[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise DataError("has a message that is not a mapping with 'role' and 'content'")
    if not messages or messages[-1]["role"] == "assistant":
        raise DataError("ends with an assistant message, which needs no answer" if messages else "has no messages")
    if isinstance(prompt, str) and not prompt.strip():
        raise DataError("is empty")
    try:
        made: Any = tokenizer.apply_chat_template(
            with_system(messages, system), add_generation_prompt=True, tokenize=True, return_dict=True, **variables
        )
    except TemplateError as error:
        raise DataError(f"does not fit the tokenizer's chat template: {error}") from error
    if not made["input_ids"]:
        raise DataError("is empty")
    return list(made["input_ids"])
