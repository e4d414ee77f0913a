"""Generate answers to a list of prompts, or to the prompts in a file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria

from ..adapt.state import trained_format
from ..data.encode import Prompt, as_in_training, encode_prompts
from ..data.prompts import AnswerFile, read_prompts
from ..data.tables import read_table
from ..data.trained import TrainedFormat
from ..errors import ConfigError, Faults, StateError
from ..layers.ops import kept_random_states
from .loading import Loading, loaded, recorded_format


def generate_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    system: str | None = None,
    use_chat_template: bool | None = None,
    stop: str | Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Generate answers to prompts, in batches of prompts of similar length.

    Args:
        prompts: texts, or lists of messages whose last one is not the assistant's.
        max_new_tokens: maximum length of an answer; it also ends at the end of the model's context window.
        batch_size: prompts per batch. Greedy answers do not depend on it, except for rounding.
        temperature: 0 is greedy decoding; above 0, tokens are sampled.
        top_p: sample from the most likely tokens with this total probability (nucleus sampling).
        seed: for sampling; the global random state is then unchanged.
        system: a system message for chats that have none. Default: the one of all chats in the adapter's training.
        use_chat_template: True applies the tokenizer's chat template to texts, as user messages; False continues them
            as they are. Default: as in the training of the adapter, if known, else True if there is a template.
        stop: an answer ends before any of these strings.
        progress: called with the number of finished prompts.

    Returns:
        The answers in the order of the prompts, without the prompt and special tokens.

    Raises:
        ConfigError: an argument is invalid; lists them all.
        DataError: a prompt is empty, not a chat, or longer than the model's context window; lists them all.
        StateError: the model does not generate text.
    """
    each = iterate_texts(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, temperature=temperature,
        top_p=top_p, seed=seed, system=system, use_chat_template=use_chat_template, stop=stop, progress=progress,
    )  # fmt: skip
    return collect_answers(each, len(prompts), None)


def iterate_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    system: str | None = None,
    use_chat_template: bool | None = None,
    stop: str | Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
    trained: TrainedFormat | None = None,
) -> Iterator[tuple[int, str]]:
    """The answers of `generate_texts`, each with the position of its prompt, as batches are finished.

    Args:
        trained: the format of the adapter's training; default: that of the model's active adapter.
    """
    if not model.can_generate():
        raise StateError(f"generate_texts: {type(model).__name__} does not generate text. Pass a language model.")
    stops = [stop] if isinstance(stop, str) else list(stop or [])
    _check_settings(prompts, max_new_tokens, batch_size, temperature, top_p, stops, seed)
    trained = trained or trained_format(model)
    prompts, system, use_chat_template = as_in_training(trained, prompts, system, use_chat_template)
    encoded = encode_prompts(
        tokenizer, prompts, system, use_chat_template, window_of(model),
        continued=not model.config.is_encoder_decoder, variables=trained.variables if trained is not None else None,
    )  # fmt: skip
    options = sampling(model, tokenizer, temperature, top_p, stops)
    done = 0
    with answering(model, seed):
        for rows, room in _batches(encoded, batch_size, max_new_tokens, model):
            written = _answer(model, tokenizer, [encoded[r] for r in rows], room, options, stops)
            for row, tokens in zip(rows, written, strict=True):
                yield row, before_stop(str(tokenizer.decode(tokens, skip_special_tokens=True)), stops)
            done += len(rows)
            if progress is not None:
                progress(done)


def generate_answers(
    source: Any,
    prompts: Sequence[Prompt] | None = None,
    *,
    file: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    column: str | None = None,
    tokenizer: Any = None,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    system: str | None = None,
    use_chat_template: bool | None = None,
    stop: str | Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **loading: Unpack[Loading],
) -> list[str]:
    """Load a model and generate answers to prompts, passed here or in a file, as `hf-lora generate` does.

    Args:
        source: an adapter or a full model, its folder or its name on the Hub; or a model in memory with `tokenizer`.
        file: instead of `prompts`, a .txt with one prompt per line, or CSV, TSV, JSON, JSONL or Parquet.
        out: JSONL file for the rows of `file` with their answers in a column `generated`; an existing file is replaced
            when all answers are generated. Until then, finished rows are in `<out>.partial`.
        column: the column of prompts in `file`; default: that of the adapter's training, else found by its usual name.
        progress: called with the number of finished prompts and the total.
        loading: see `load_for_generation`; all others: see `generate_texts`.

    Returns:
        The answers in the order of the prompts.

    Raises:
        ConfigError: arguments contradict each other, or `out` cannot be written.
        DataError: the file is missing or malformed, or a prompt is invalid; lists every such row.
        AdapterFileError, StateError: see `load_for_generation`.
    """
    if (prompts is None) == (file is None):
        raise ConfigError("generate_answers: pass either prompts (--prompt) or a file of them (--file).")
    if file is None and (out is not None or column is not None):
        raise ConfigError("generate_answers: out and column need a file (--file). Omit them.")
    table = None if file is None else read_table(file, prompts=True)
    with nullcontext() if table is None or out is None else AnswerFile(table, out) as written:
        trained = recorded_format(source, **loading)
        questions = list(prompts or []) if table is None else read_prompts(table, column, trained)
        model, tokenizer = loaded("generate_answers", source, tokenizer, **loading)
        each = iterate_texts(
            model, tokenizer, questions, max_new_tokens=max_new_tokens, batch_size=batch_size,
            temperature=temperature, top_p=top_p, seed=seed, system=system, use_chat_template=use_chat_template,
            stop=stop, progress=None if progress is None else lambda done: progress(done, len(questions)),
            trained=trained,
        )  # fmt: skip
        return collect_answers(each, len(questions), written)


def collect_answers(each: Iterator[tuple[int, str]], count: int, file: AnswerFile | None) -> list[str]:
    """The answers in order, which are also written to `file` as they come."""
    answers = [""] * count
    for row, answer in each:
        answers[row] = answer
        if file is not None:
            file.add(row, answer)
    if file is not None:
        file.finish()
    return answers


def _check_settings(
    prompts: Any, max_new_tokens: int, batch_size: int, temperature: float, top_p: float, stops: list[str],
    seed: int | None,
) -> None:  # fmt: skip
    faults = Faults("generate_texts")
    if isinstance(prompts, str):
        faults.add("prompts is a string; it must be a list")
    check_sampling(faults, max_new_tokens, temperature, top_p, seed)
    if batch_size < 1:
        faults.add(f"batch_size={batch_size} must be at least 1")
    if not all(stops):
        faults.add("stop contains an empty string")
    faults.check(ConfigError, "Correct these values.")


def check_sampling(
    faults: Faults, max_new_tokens: int, temperature: float, top_p: float, seed: int | None = None
) -> None:
    """Add a fault for each invalid value."""
    if max_new_tokens < 1:
        faults.add(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 <= temperature < math.inf:
        faults.add(f"temperature={temperature} must be a number that is not negative; 0 is greedy decoding")
    if not 0 < top_p <= 1:
        faults.add(f"top_p={top_p} must be above 0 and at most 1")
    elif top_p < 1 and temperature == 0:
        faults.add(f"top_p={top_p} has no effect without a temperature above 0")
    if seed is not None and not -(2**63) <= seed < 2**63:
        faults.add(f"seed={seed} must fit into 64 bits")


def window_of(model: Any) -> int | None:
    """The context window in tokens, or None if it is unlimited."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def sampling(
    model: Any, tokenizer: PreTrainedTokenizerBase, temperature: float, top_p: float, stops: Sequence[str] = ()
) -> dict[str, Any]:
    """Arguments for `model.generate` within `answering`, which removes the model's own settings.

    Of `stops`, those that are one token end an answer as EOS does: decoding would skip special ones.
    """
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    tokens = tokenizer.get_added_vocab()
    ends = dict.fromkeys(e for e in (tokenizer.eos_token_id, *ends) if e is not None)
    padding = next((p for p in (tokenizer.pad_token_id, *ends) if p is not None), 0)
    ends |= dict.fromkeys(tokens[stop] for stop in stops if stop in tokens)
    draw = temperature > 0
    return {
        "do_sample": draw,
        "temperature": temperature if draw else 1.0,
        "top_p": top_p if draw else 1.0,
        "top_k": 0 if draw else 50,  # 50 is the default, which avoids a warning without sampling
        "num_beams": 1,
        "return_dict_in_generate": False,
        "eos_token_id": list(ends) or None,
        "pad_token_id": padding,
    }


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Within, the model is in eval mode; afterwards its mode is restored."""
    trained = model.training
    if trained:
        model.eval()
    try:
        yield
    finally:
        if trained:
            model.train()


@contextmanager
def answering(model: Any, seed: int | None = None) -> Iterator[None]:
    """Within, the model is in eval mode and, with a seed, has a separate random state; afterwards all is restored.

    Of the model's generation config only special tokens and the type of cache are kept meanwhile: its penalties,
    banned words and minimum length would change greedy answers, and transformers warns about its `max_length`.
    """
    settings = model.generation_config
    alone = nullcontext() if seed is None else kept_random_states()
    with alone, evaluating(model):
        if seed is not None:
            torch.manual_seed(seed)
        model.generation_config = GenerationConfig(**_kept_settings(settings))
        try:
            yield
        finally:
            model.generation_config = settings


def _kept_settings(settings: GenerationConfig) -> dict[str, Any]:
    return {
        name: value
        for name, value in settings.to_dict().items()
        if name.endswith("token_id") or name.startswith("cache_") or name == "use_cache"
    }


def room_for(model: Any, prompt_length: int, max_new_tokens: int) -> int:
    """The maximum length of an answer within the model's context window."""
    window = window_of(model)
    if window is None:
        return max_new_tokens
    return min(max_new_tokens, window - (1 if model.config.is_encoder_decoder else prompt_length))


def _batches(
    encoded: list[list[int]], batch_size: int, max_new_tokens: int, model: Any
) -> Iterator[tuple[list[int], int]]:
    """(rows, maximum new tokens), longest prompts first; all rows of a batch have the same maximum."""
    rows: list[int] = []
    room = 0
    for row in sorted(range(len(encoded)), key=lambda r: -len(encoded[r])):
        own = room_for(model, len(encoded[row]), max_new_tokens)
        if rows and (len(rows) == batch_size or own != room):
            yield rows, room
            rows = []
        rows.append(row)
        room = own
    if rows:
        yield rows, room


def _answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    room: int,
    options: dict[str, Any],
    stops: list[str],
) -> list[list[int]]:
    """The new tokens of each prompt, up to EOS.

    Prompts are padded on the left, where the answer follows; those of an encoder on the right, since encoders may
    number their positions from the first token, padding included.
    """
    rows, side = [torch.tensor(prompt) for prompt in prompts], "right" if model.config.is_encoder_decoder else "left"
    ids = pad_sequence(rows, True, options["pad_token_id"], padding_side=side).to(model.device)
    mask = pad_sequence([torch.ones_like(row) for row in rows], True, padding_side=side).to(model.device)
    start = 1 if model.config.is_encoder_decoder else ids.shape[1]
    if stops:
        options = options | {"stopping_criteria": [_StopsAt(tokenizer, stops, start)]}
    written = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=room, **options)
    return new_tokens(written, start, options["eos_token_id"])


class _StopsAt(StoppingCriteria):
    """Ends the rows whose answer contains one of the strings.

    `generate(stop_strings=…)` also matches the prompt, fails for word-level tokenizers and for strings with characters
    that no token has, and processes the whole vocabulary first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: list[str], start: int) -> None:
        self.tokenizer, self.stops, self.start = tokenizer, stops, start

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        # Nearly every token adds at least one character, so a new stop string lies in the last few tokens.
        begin = max(self.start, input_ids.shape[1] - 2 * max(map(len, self.stops)) - 8)
        texts = self.tokenizer.batch_decode(input_ids[:, begin:], skip_special_tokens=True)
        return torch.tensor([any(s in t for s in self.stops) for t in texts], device=input_ids.device)


def new_tokens(written: Tensor, start: int, ends: list[int] | None) -> list[list[int]]:
    """The tokens of rows (B, T) from `start` on, each up to its first EOS token."""
    rows = []
    for row in written[:, start:].tolist():
        stop = next((i for i, token in enumerate(row) if ends and token in ends), len(row))
        rows.append(row[:stop])
    return rows


def before_stop(text: str, stops: list[str]) -> str:
    """The text before the first of `stops`."""
    return text[: min((found for s in stops if (found := text.find(s)) >= 0), default=len(text))]
