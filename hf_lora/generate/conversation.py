"""`Conversation`: a chat with a language model that keeps what was said, with its adapter on or off."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import TextStreamer

from ..data.encode import encode_prompts
from ..errors import ConfigError, DataError, Faults, StateError
from ..model import LoraModel
from .texts import answering, check_sampling, new_tokens, room_for, sampling, window_of


class Conversation:
    """A chat in which every answer sees what was said before.

    Args:
        model: a language model, with adapters or without.
        tokenizer: its tokenizer, with a chat template.
        system: the system message; None leaves it to the template.
        max_new_tokens, temperature, top_p: as in `generate_texts`.
        seed: for the first answer's random numbers; each further answer takes the next seed.

    Attributes:
        messages: what was said, without the system message; mappings with `role` and `content`.
        forgotten: messages that were left out because the model's window is full, since the last `reset`.

    Raises:
        ConfigError: the tokenizer has no chat template, or a value cannot be used.
        StateError: the model writes no text.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> None:
        faults = Faults("Conversation(model, tokenizer)")
        check_sampling(faults, max_new_tokens, temperature, top_p)
        if tokenizer.chat_template is None:
            faults.add(
                "the tokenizer has no chat template, so turns cannot be told apart; generate_texts (hf-lora generate) "
                "continues plain texts"
            )
        faults.check(ConfigError, "Correct these.")
        if not model.can_generate():
            raise StateError(f"Conversation: {type(model).__name__} writes no text. Give it a language model.")
        self.model = model
        self.tokenizer = tokenizer
        self.system = system
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.seed = seed
        self.messages: list[dict[str, str]] = []
        self.forgotten = 0
        self._adapter = isinstance(model, LoraModel)

    @property
    def adapter_in_use(self) -> bool:
        """Whether the answers are the adapter's; False for a plain model too."""
        return self._adapter

    def use_adapter(self, wanted: bool) -> None:
        """Let the adapter answer, or the base model; what was said stays. Outside `say` the model is not touched.

        Raises:
            StateError: the model has no adapter that could be switched.
        """
        if not isinstance(self.model, LoraModel):
            raise StateError(
                f"use_adapter({wanted}): this {type(self.model).__name__} is a plain or merged model, without an "
                "adapter beside it. Load the adapter unmerged."
            )
        self._adapter = wanted

    def reset(self) -> None:
        """Forget what was said; the system message and the adapter's switch stay."""
        self.messages.clear()
        self.forgotten = 0

    def say(self, text: str, stream: Callable[[str], None] | None = None) -> str:
        """Say something and get the answer.

        The oldest exchanges are left out (and counted in `forgotten`) once the conversation no longer fits into the
        model's window with room for an answer. An answer that is interrupted (`KeyboardInterrupt`) is kept as far as
        it came; after any other error the conversation is what it was.

        Args:
            stream: called with each piece of the answer as soon as its words are whole.

        Raises:
            DataError: the text is empty, or alone longer than the window.
        """
        if not text.strip():
            raise DataError("Conversation.say: the text is empty. Say something.")
        kept, ids = self._that_fits([*self.messages, {"role": "user", "content": text}])
        said: list[str] = []
        streamer = _Streamer(self.tokenizer, said, stream)
        options = sampling(self.model, self.tokenizer, self.temperature, self.top_p)
        tokens = torch.tensor([ids], device=self.model.device)
        try:
            with answering(self.model, self.seed), self._speaker():
                written = self.model.generate(
                    input_ids=tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=room_for(self.model, len(ids), self.max_new_tokens),
                    streamer=streamer,
                    **options,
                )
        except KeyboardInterrupt:
            self._keep(kept, "".join(said))
            raise
        start = 1 if self.model.config.is_encoder_decoder else len(ids)
        answer: str = self.tokenizer.decode(
            new_tokens(written, start, options["eos_token_id"])[0], skip_special_tokens=True
        )
        self._keep(kept, answer)
        return answer

    def _speaker(self) -> Any:
        if isinstance(self.model, LoraModel) and not self._adapter:
            return self.model.disable_adapter()
        return nullcontext()

    def _keep(self, messages: list[dict[str, str]], answer: str) -> None:
        self.forgotten += len(self.messages) + 1 - len(messages)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        if self.seed is not None:
            self.seed += 1

    def _that_fits(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """The newest messages that fit, beginning with the user's, and the prompt's tokens."""
        window = window_of(self.model)
        while True:
            [ids] = encode_prompts(self.tokenizer, [messages], self.system)
            if window is None or len(ids) + min(self.max_new_tokens, window // 2) <= window:
                return messages, ids
            if len(messages) == 1:
                if len(ids) >= window:
                    raise DataError(
                        f"Conversation.say: the text has {len(ids):,} tokens with its template; the model's window "
                        f"holds {window:,}, and an answer needs some of them. Shorten it."
                    )
                return messages, ids
            messages = messages[2:]


class _Streamer(TextStreamer):
    """Hands on the text of new tokens, and collects it."""

    def __init__(self, tokenizer: Any, said: list[str], stream: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.said = said
        self.stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.said.append(text)
            if self.stream is not None:
                self.stream(text)
