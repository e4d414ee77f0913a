"""`Conversation`: a multi-turn chat with a language model, with its adapter on or off."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging

from ..adapt.state import trained_format
from ..data.encode import as_in_training, encode_prompts
from ..data.trained import TrainedFormat
from ..errors import ConfigError, DataError, Faults, StateError
from ..model import LoraModel
from .texts import answering, check_sampling, new_tokens, room_for, sampling, window_of

logger = logging.get_logger(__name__)


class Conversation:
    """A multi-turn chat with a language model.

    Args:
        model: a language model, with adapters or without.
        tokenizer: its tokenizer, with a chat template.
        system: the system message; default: the one of all chats in the adapter's training, else that of the
            template, if any.
        max_new_tokens: as in `generate_texts`, and so are the next two.
        temperature: 0 is greedy decoding.
        top_p: the share of probability that is sampled from.
        seed: random seed of the first answer; each further answer uses the next seed.
        trained: what the adapter of a merged model recorded; default: what the model's adapter did.

    Attributes:
        messages: the messages so far, without the system message; mappings with `role` and `content`.
        forgotten: number of messages dropped since the last `reset` because the context window is full.

    Raises:
        ConfigError: the tokenizer has no chat template, or a value is invalid.
        StateError: the model does not generate text.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        trained: TrainedFormat | None = None,
    ) -> None:
        faults = Faults("Conversation(model, tokenizer)")
        check_sampling(faults, max_new_tokens, temperature, top_p, seed)
        if tokenizer.chat_template is None:
            faults.add(
                "the tokenizer has no chat template, which turns need; to continue plain texts use generate_texts "
                "(hf-lora generate)"
            )
        faults.check(ConfigError, "Correct these.")
        if not model.can_generate():
            raise StateError(f"Conversation: {type(model).__name__} does not generate text. Pass a language model.")
        self.model = model
        self.tokenizer = tokenizer
        trained = trained or trained_format(model)
        self.system = as_in_training(trained, [[]], system)[1]
        self._variables = trained.variables if trained is not None else None
        if trained is not None and trained.use_chat_template is False:
            logger.warning(
                f"The adapter was trained without the chat template ({trained}), which a conversation needs: its "
                "answers may be worse than those of generate_texts (hf-lora generate)."
            )
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.seed = seed
        self.messages: list[dict[str, str]] = []
        self.forgotten = 0
        self._adapter = isinstance(model, LoraModel)

    @property
    def adapter_in_use(self) -> bool:
        """Whether answers use the adapter; False for a plain model."""
        return self._adapter

    def use_adapter(self, wanted: bool) -> None:
        """Turn the adapter on or off for further answers; messages are kept. Outside `say` the model is not changed.

        Raises:
            StateError: the model has no adapter.
        """
        if not isinstance(self.model, LoraModel):
            raise StateError(
                f"use_adapter({wanted}): this {type(self.model).__name__} is a plain or merged model without a "
                "separate adapter. Load the adapter unmerged."
            )
        self._adapter = wanted

    def reset(self) -> None:
        """Clear the messages; the system message and the choice of adapter are kept."""
        self.messages.clear()
        self.forgotten = 0

    def say(self, text: str, stream: Callable[[str], None] | None = None) -> str:
        """Send a user message and return the answer.

        The oldest exchanges are dropped (and counted in `forgotten`) when the conversation no longer fits into the
        model's context window with room for an answer. If an answer is interrupted (`KeyboardInterrupt`), the part
        generated so far is kept; after any other error the conversation is unchanged.

        Args:
            stream: called with each piece of the answer as soon as its words are complete.

        Raises:
            DataError: the text is empty, or longer than the context window.
        """
        if not text.strip():
            raise DataError("Conversation.say: the text is empty.")
        kept, ids = self._fitting([*self.messages, {"role": "user", "content": text}])
        pieces: list[str] = []
        streamer = _Streamer(self.tokenizer, pieces, stream)
        options = sampling(self.model, self.tokenizer, self.temperature, self.top_p)
        tokens = torch.tensor([ids], device=self.model.device)
        try:
            with answering(self.model, self.seed), self._adapter_choice():
                written = self.model.generate(
                    input_ids=tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=room_for(self.model, len(ids), self.max_new_tokens),
                    streamer=streamer,
                    **options,
                )
        except KeyboardInterrupt:
            self._keep(kept, "".join(pieces))
            raise
        start = 1 if self.model.config.is_encoder_decoder else len(ids)
        reply = new_tokens(written, start, options["eos_token_id"])[0]
        answer = str(self.tokenizer.decode(reply, skip_special_tokens=True))
        self._keep(kept, answer)
        return answer

    def _adapter_choice(self) -> AbstractContextManager[object]:
        if isinstance(self.model, LoraModel) and not self._adapter:
            return self.model.disable_adapter()
        return nullcontext()

    def _keep(self, messages: list[dict[str, str]], answer: str) -> None:
        self.forgotten += len(self.messages) + 1 - len(messages)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        if self.seed is not None:
            self.seed += 1

    def _fitting(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """The newest messages that fit, beginning with a user message, and the tokens of the prompt."""
        window = window_of(self.model)
        while True:
            [ids] = encode_prompts(self.tokenizer, [messages], self.system, variables=self._variables)
            if window is None or len(ids) + min(self.max_new_tokens, window // 2) <= window:
                return messages, ids
            if len(messages) == 1:
                if len(ids) >= window:
                    raise DataError(
                        f"Conversation.say: the text has {len(ids):,} tokens with its template; the model's context "
                        f"window has {window:,}, including the answer. Shorten it."
                    )
                return messages, ids
            messages = messages[2:]


class _Streamer(TextStreamer):
    """Collects the text of new tokens and passes it on."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, pieces: list[str], stream: Callable[[str], None] | None
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces = pieces
        self.stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.pieces.append(text)
            if self.stream is not None:
                self.stream(text)
