"""Text from a language model: load it with its tokenizer, and let it answer a list of prompts."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ..adapt.labels import task_type_of
from ..data.encode import Prompt, encode_prompts
from ..errors import AdapterFileError, ConfigError, Faults, StateError, nearest
from ..export import DTYPES
from ..files.format import CONFIG_NAME, read_config
from ..hub.download import FullModelError, local_adapter
from ..layers.ops import used_devices
from ..load import find_processor
from ..model import LoraModel

PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


# Loading -------------------------------------------------------------------------------------------------------------


def load_for_generation(
    source: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str] | None = None,
    merge: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    token: str | None = None,
    any_task: bool = False,
) -> tuple[Any, Any]:
    """Load a language model that writes text, and its tokenizer.

    Args:
        source: an adapter or a full (merged) model: its folder, or its name on the Hub.
        base_model: folder or name of an adapter's base; None takes the one that the adapter names.
        merge: fold the adapter into the weights.
        revision: branch, tag or commit of `source`.
        subfolder: of an adapter that does not lie in the root of `source`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; None keeps the checkpoint's.
        device: such as `"cuda:1"`; None takes the accelerator if there is one, else the CPU.
        token: for the Hub.
        any_task: load an adapter of another kind too, such as a classifier's.

    Returns:
        (model, tokenizer). The model is in eval mode: a `LoraModel`, or a plain one if merged. The tokenizer is the
        one saved with the adapter, else the base's.

    Raises:
        ConfigError: an argument cannot be used.
        AdapterFileError: nothing can be loaded from `source`, or it has no tokenizer.
        StateError: the model is of a kind that writes no text, such as a classifier.
    """
    call = f"load_for_generation({os.fspath(source)!r})"
    place = _check_arguments(call, dtype, device)
    try:
        folder = local_adapter(source, revision, token, subfolder=subfolder)
    except FullModelError:
        folder = Path(source)
    if (folder / CONFIG_NAME).is_file():
        model = LoraModel.from_pretrained(folder, base_model=base_model, merge=merge, dtype=dtype, token=token)
        base: Any = base_model or model.config._name_or_path
    else:
        if base_model is not None or merge:
            raise ConfigError(
                f"{call}: this is no adapter (no {CONFIG_NAME}), so there is nothing to put on a base model or to "
                "merge. Leave base_model and merge out."
            )
        base = source
        model = _load_whole(call, source, folder, revision, dtype, token)
    if not model.can_generate() and not any_task:
        task = PIPELINES.get(task_type_of(model) or "")
        what = f"a {task} model" if task else f"a {type(model).__name__}"
        use = f'hf_lora.pipeline("{task}", {os.fspath(source)!r})' if task else "its forward"
        raise StateError(f"{call}: this is an adapter of {what}, which writes no text. Use it through {use}.")
    tokenizer = find_processor("AutoTokenizer", folder, base)
    if tokenizer is None:
        raise AdapterFileError(
            f"{call}: there is no tokenizer in {folder}, nor with {str(base)!r}. Save the one of the training there: "
            "tokenizer.save_pretrained(folder)."
        )
    if not getattr(model, "is_quantized", False):  # a quantised one lies where it was loaded
        model.to(place)
    return model.eval(), tokenizer


def _check_arguments(call: str, dtype: str | None, device: str | None) -> torch.device:
    faults = Faults(call)
    if dtype is not None and dtype not in DTYPES:
        faults.add(f"dtype={dtype!r} is unknown{nearest(dtype, DTYPES)}; it is one of {', '.join(DTYPES)}")
    place = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device is not None:
        try:
            place = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:  # unknown words, and kinds that this PyTorch was not built for
            faults.add(f"device={device!r} cannot be used: {str(error).splitlines()[0]}")
    faults.check(ConfigError, "Correct these, or leave them out.")
    return place


def _load_whole(
    call: str,
    source: str | os.PathLike[str],
    folder: Path,
    revision: str | None,
    dtype: str | None,
    token: str | None,
) -> Any:
    """A full model, if its checkpoint is one that writes text: a head drawn at random would answer, too."""
    if Path(source).is_dir() and not (folder / "config.json").is_file():
        read_config(folder)  # says what is there instead
    given = {k: v for k, v in {"revision": revision, "token": token}.items() if v is not None}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **given)
        for name in config.architectures or []:
            cls = getattr(transformers, name, None)
            if cls is not None and not cls.can_generate():
                raise StateError(
                    f"{call}: this is a {name}, which writes no text. Name a language model, or an adapter of one."
                )
        auto: Any = getattr(
            transformers, "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
        )
        return auto.from_pretrained(source, **given, **({} if dtype is None else {"dtype": dtype}))
    except (OSError, ValueError) as error:
        raise AdapterFileError(
            f"{call}: it holds no adapter, and no language model could be loaded from it "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the name."
        ) from error


# Answering -----------------------------------------------------------------------------------------------------------


def generate_texts(
    model: Any,
    tokenizer: Any,
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
    """Let a model answer prompts, in batches of prompts that are alike in length.

    Args:
        prompts: texts, or lists of messages whose last one is not the assistant's.
        max_new_tokens: most tokens of an answer; fewer where the model's window ends.
        batch_size: prompts at a time. Greedy answers do not depend on it but for rounding.
        temperature: 0 takes the likeliest token each time; above it, tokens are drawn.
        top_p: tokens are drawn from the likeliest that hold this share of the probability.
        seed: for drawing; the global random numbers are then left as they were.
        system: a message that goes before chats which have none.
        use_chat_template: put a text into the tokenizer's chat template as the user's message. None: if it has one.
        stop: an answer ends before any of these.
        progress: called with the number of prompts that are done.

    Returns:
        The answers in the order of the prompts, without prompt and special tokens.

    Raises:
        ConfigError: an argument cannot be used; lists them all.
        DataError: a prompt is empty, no chat, or longer than the model's window; lists them all.
        StateError: the model writes no text.
    """
    if not model.can_generate():
        raise StateError(f"generate_texts: {type(model).__name__} writes no text. Give it a language model.")
    stops = [stop] if isinstance(stop, str) else list(stop or [])
    _check_settings(prompts, max_new_tokens, batch_size, temperature, top_p, stops)
    encoded = encode_prompts(tokenizer, prompts, system, use_chat_template, window_of(model))
    options = sampling(model, tokenizer, temperature, top_p)
    answers = [""] * len(encoded)
    done = 0
    with answering(model, seed):
        for rows, room in _batches(encoded, batch_size, max_new_tokens, model):
            written = _answer(model, tokenizer, [encoded[r] for r in rows], room, options, stops)
            for row, tokens in zip(rows, written, strict=True):
                answers[row] = before_stop(tokenizer.decode(tokens, skip_special_tokens=True), stops)
            done += len(rows)
            if progress is not None:
                progress(done)
    return answers


def _check_settings(
    prompts: Any, max_new_tokens: int, batch_size: int, temperature: float, top_p: float, stops: list[str]
) -> None:
    faults = Faults("generate_texts")
    if isinstance(prompts, str):
        faults.add("prompts is one text; it must be a list")
    check_sampling(faults, max_new_tokens, temperature, top_p)
    if batch_size < 1:
        faults.add(f"batch_size={batch_size} must be at least 1")
    if not all(stops):
        faults.add("stop holds an empty text")
    faults.check(ConfigError, "Correct these values.")


def check_sampling(faults: Faults, max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Add a fault for each of these that `generate` could not use."""
    if max_new_tokens < 1:
        faults.add(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not temperature >= 0:
        faults.add(f"temperature={temperature} must not be negative; 0 takes the likeliest token")
    if not 0 < top_p <= 1:
        faults.add(f"top_p={top_p} must be above 0 and at most 1")


def window_of(model: Any) -> int | None:
    """How many tokens the model's positions reach, or None where they have no end."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def sampling(model: Any, tokenizer: Any, temperature: float, top_p: float) -> dict[str, Any]:
    """Arguments for `model.generate`, complete, so that none of the model's own settings for drawing is mixed in."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    stops = list(dict.fromkeys(e for e in (tokenizer.eos_token_id, *ends) if e is not None))
    padding = next((p for p in (tokenizer.pad_token_id, *stops) if p is not None), 0)
    draw = temperature > 0
    return {
        "do_sample": draw,
        "temperature": temperature if draw else 1.0,
        "top_p": top_p if draw else 1.0,
        "top_k": 0 if draw else 50,  # 50 is what generate takes for unset where nothing is drawn
        "num_beams": 1,
        "return_dict_in_generate": False,
        "eos_token_id": stops or None,
        "pad_token_id": padding,
    }


@contextmanager
def answering(model: Any, seed: int | None = None) -> Iterator[None]:
    """Without dropout and, given a seed, with random numbers of its own; afterwards all is as it was.

    A `max_length` in the model's own settings is put away meanwhile: transformers warns of it at every call.
    """
    trained, settings = model.training, model.generation_config
    alone = nullcontext() if seed is None else torch.random.fork_rng(devices=used_devices())
    with alone:
        if seed is not None:
            torch.manual_seed(seed)
        if trained:
            model.eval()
        model.generation_config = copy.deepcopy(settings)
        model.generation_config.max_length = None
        try:
            yield
        finally:
            model.generation_config = settings
            if trained:
                model.train()


def room_for(model: Any, prompt_length: int, max_new_tokens: int) -> int:
    """Tokens that an answer may have before the model's window ends."""
    window = window_of(model)
    if window is None:
        return max_new_tokens
    return min(max_new_tokens, window - (1 if model.config.is_encoder_decoder else prompt_length))


def _batches(
    encoded: list[list[int]], batch_size: int, max_new_tokens: int, model: Any
) -> Iterator[tuple[list[int], int]]:
    """(rows, most new tokens), longest prompts first; rows that share a batch have the same room."""
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
    model: Any, tokenizer: Any, prompts: list[list[int]], room: int, options: dict[str, Any], stops: list[str]
) -> list[list[int]]:
    """The new tokens of each prompt, up to its end token. Padding goes before the prompts."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), options["pad_token_id"])
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    start = 1 if model.config.is_encoder_decoder else width
    if stops:
        options = options | {"stopping_criteria": [_StopsAt(tokenizer, stops, start)]}
    written = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=room, **options)
    return new_tokens(written, start, options["eos_token_id"])


class _StopsAt(transformers.StoppingCriteria):
    """Ends the rows whose answer holds one of the texts.

    transformers' own criterion reads the vocabulary, and fails on a tokenizer whose tokens are words.
    """

    def __init__(self, tokenizer: Any, stops: list[str], start: int) -> None:
        self.tokenizer = tokenizer
        self.stops = stops
        self.start = start

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        # A token adds a character or more in nearly every case, so a stop that just came lies in the last few.
        begin = max(self.start, input_ids.shape[1] - 2 * max(map(len, self.stops)) - 8)
        texts = self.tokenizer.batch_decode(input_ids[:, begin:], skip_special_tokens=True)
        return torch.tensor([any(s in t for s in self.stops) for t in texts], device=input_ids.device)


def new_tokens(written: Tensor, start: int, ends: list[int] | None) -> list[list[int]]:
    """What stands in rows (B, T) from `start` on, each up to its first end token."""
    rows = []
    for row in written[:, start:].tolist():
        stop = next((i for i, token in enumerate(row) if ends and token in ends), len(row))
        rows.append(row[:stop])
    return rows


def before_stop(text: str, stops: list[str]) -> str:
    """The text up to the first of `stops`."""
    return text[: min((found for s in stops if (found := text.find(s)) >= 0), default=len(text))]
