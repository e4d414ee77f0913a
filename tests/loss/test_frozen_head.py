"""The loss over a frozen head: its values and gradients, where it is off, what it holds, and how it is proved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import VOCABULARY, adapter_gradients, assert_near, randomize, relative_error, token_ids
from tiny import Rows, adapter_values, texts
from torch import Tensor, nn
from transformers import LlamaForCausalLM, TrainerCallback
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from hf_lora import LoraConfig, LoraTrainer, apply_lora
from hf_lora.data.spans import IGNORED
from hf_lora.loss import frozen_head as loss_module
from hf_lora.loss.frozen_head import FrozenHead, find_frozen_head, label_scores, shifted

Make = Callable[..., Any]
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


# Through models ------------------------------------------------------------------------------------------------------


def small(name: str, **config: Any) -> Any:
    """A causal language model of a family of transformers, with its small configuration."""
    import transformers

    torch.manual_seed(0)
    values = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    made = getattr(transformers, f"{name}Config")(**values | config)
    return getattr(transformers, f"{name}ForCausalLM")(made).eval().requires_grad_(False)


def mixtral() -> Any:
    model = small("Mixtral", num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5)
    model.set_experts_implementation("eager")  # the grouped product knows no float64
    return model


ON = {
    "llama": lambda: helpers.tiny_llama(layers=1),
    "llama, tied": lambda: helpers.tiny_llama(layers=1, tied=True),
    "gpt2": helpers.tiny_gpt2,
    "phi, whose head has a bias": lambda: small("Phi"),
    "mixtral with its router's loss": mixtral,
}


@pytest.fixture(scope="module", params=ON)
def adapted(request: Any) -> Iterator[Any]:
    model = ON[request.param]().double()
    apply_lora(model, LoraConfig(r=4))
    with torch.no_grad():
        head = model.get_output_embeddings()
        if head.bias is not None:
            head.bias.normal_()
    return randomize(model)


def batch() -> dict[str, Tensor]:
    ids = token_ids(3, 12)
    labels = ids.clone()
    labels[0, :7] = labels[1, 3:5] = labels[2] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def caught_loss(model: Any, head: FrozenHead, inputs: dict[str, Any]) -> Tensor:
    with head.catch(model, inputs["labels"]) as caught:
        loss: Tensor = model(**inputs)["loss"]
    assert caught.fault is None
    return loss


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return adapter_gradients(model)


@pytest.mark.parametrize("tokens", [None, 7, torch.tensor(7)], ids=["mean", "number", "tensor"])
def test_loss_and_every_gradient_are_the_models_own(adapted: Any, tokens: Any) -> None:
    head = find_frozen_head(adapted)
    assert head is not None
    assert head.off is None
    inputs = batch() | ({} if tokens is None else {"num_items_in_batch": tokens})
    loss = caught_loss(adapted, head, inputs)
    found = gradients(adapted, loss)
    outputs = adapted(**inputs)
    # transformers takes the cross entropy of float64 logits in float32, so it is taken here by hand too.
    mask = shifted(inputs["labels"]) != IGNORED
    exact = F.cross_entropy(outputs.logits[mask], shifted(inputs["labels"])[mask], reduction="sum")
    exact = exact / (mask.sum() if tokens is None else tokens)
    if getattr(outputs, "aux_loss", None) is not None:
        assert outputs.aux_loss > 0.1
        exact = exact + 0.5 * outputs.aux_loss
    assert float(loss) == pytest.approx(float(exact), rel=1e-10)
    assert float(loss) == pytest.approx(float(outputs.loss), rel=8 * EPS[torch.float32])
    for reference in (exact, adapted(**inputs).loss):
        expected = gradients(adapted, reference)
        assert len(expected) > 4
        assert expected.keys() == found.keys()
        for name, gradient in expected.items():
            assert_near(found[name], gradient, torch.float32, 32)
            assert gradient.count_nonzero()
    head.prove(adapted, batch())
    assert head.off is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_a_model_in_a_short_dtype_is_proved(dtype: torch.dtype, autocast: bool) -> None:
    model = helpers.tiny_llama(layers=1).to(dtype)
    apply_lora(model, LoraConfig(r=4))
    head = find_frozen_head(model)
    assert head is not None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        head.prove(model, batch())
    assert head.off is None


def test_the_model_is_as_it_was_after_catch() -> None:
    model = helpers.tiny_llama(layers=1)
    head = FrozenHead(model)
    before = dict(model.__dict__), dict(model.lm_head.__dict__)
    inputs = batch()
    expected = model(**inputs)
    caught_loss(model, head, inputs)
    with pytest.raises(IndexError), head.catch(model, inputs["labels"]):
        model(**inputs | {"input_ids": inputs["input_ids"] + VOCABULARY})
    assert (model.__dict__, model.lm_head.__dict__) == before
    found = model(**inputs)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    with torch.inference_mode():
        assert float(caught_loss(model, head, inputs)) == pytest.approx(float(expected.loss))


def adapted_head() -> Any:
    return apply_lora(helpers.tiny_llama(layers=1), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))


def adapted_head_at_rest() -> Any:
    return adapted_head().requires_grad_(False)


def saved_head() -> Any:
    return apply_lora(helpers.tiny_llama(layers=1), LoraConfig(r=2, modules_to_save=["lm_head"]))


def saved_head_at_rest() -> Any:
    return saved_head().requires_grad_(False)


def trained_bias() -> Any:
    return apply_lora(small("Phi"), LoraConfig(r=2, bias="all"))


def trained_embedding() -> Any:
    model = helpers.tiny_llama(layers=1, tied=True)
    model.requires_grad_(False).model.embed_tokens.requires_grad_(True)
    return model


def hooked_head() -> Any:
    model = helpers.tiny_llama(layers=1).requires_grad_(False)
    model.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    return model


def own_loss() -> Any:
    model = helpers.tiny_llama(layers=1)
    model.loss_function = lambda logits, labels, **_: logits.mean()
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (adapted_head, "lm_head is trained"),
        (adapted_head_at_rest, "lm_head has an adapter"),
        (saved_head, "lm_head is trained"),
        (saved_head_at_rest, "lm_head is a Replacement, not a plain linear layer"),
        (trained_bias, "lm_head is trained"),
        (trained_embedding, "lm_head is trained"),
        (hooked_head, "lm_head has a hook"),
        (own_loss, "a loss_function was set on the model"),
    ],
)
def test_a_head_that_is_not_frozen_or_not_plain_is_left_alone(make: Callable[[], Any], why: str) -> None:
    head = find_frozen_head(make())
    assert head is not None
    assert why in str(head.off)


@pytest.mark.parametrize(
    "make", [helpers.tiny_t5, helpers.tiny_bert, lambda: helpers.tiny_bert(cls="BertForMaskedLM")]
)
def test_only_causal_language_models_have_one(make: Callable[[], Any]) -> None:
    assert find_frozen_head(make()) is None
    assert find_frozen_head(nn.Linear(2, 2)) is None


# The proof -----------------------------------------------------------------------------------------------------------


class _Changed(LlamaForCausalLM):
    """A Llama whose forward treats the hidden states as its subclass says."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits, loss = self.finish(hidden, labels)
        return {"loss": loss, "logits": logits}

    def finish(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(hidden)
        return logits, self.loss_function(logits, labels, self.vocab_size)


class AsUsualForCausalLM(_Changed):
    pass


class InPlaceForCausalLM(_Changed):
    def finish(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(hidden)
        logits.mul_(0.5)
        return logits, self.loss_function(logits, labels, self.vocab_size)


class OwnEntropyForCausalLM(_Changed):
    def finish(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(hidden)
        return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class TwiceForCausalLM(_Changed):
    def finish(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits, others = self.lm_head(hidden), self.lm_head(hidden.flip(1))
        return logits, self.loss_function(logits, labels, self.vocab_size) + others.mean()


class UnshiftedForCausalLM(_Changed):
    def finish(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(hidden)
        return logits, self.loss_function(logits, labels, self.vocab_size, shift_labels=labels)


def changed(cls: type[Any], **config: Any) -> Any:
    return cls(helpers.tiny_llama(layers=1, **config).config).eval().requires_grad_(False)


def test_the_changed_models_differ_by_their_changes_alone() -> None:
    head = find_frozen_head(model := changed(AsUsualForCausalLM))
    assert head is not None
    head.prove(model, batch())
    assert head.off is None


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: small("Gemma2", final_logit_softcapping=2.0), "changes the output of lm_head before its loss"),
        (lambda: small("Cohere", logit_scale=0.0625), "changes the output of lm_head before its loss"),
        (lambda: changed(InPlaceForCausalLM), "changes the output of lm_head before its loss"),
        (lambda: changed(OwnEntropyForCausalLM), "uses its logits for something else"),
        # As many hidden states as tokens: nothing fails, yet it is noticed.
        (lambda: changed(OwnEntropyForCausalLM, vocab_size=32), "does not use its loss_function"),
        (lambda: changed(TwiceForCausalLM), "lm_head is called with other tokens than those of the labels"),
        (lambda: changed(UnshiftedForCausalLM), "changes the labels before its loss"),
    ],
    ids=["softcap", "logit scale", "in place", "own loss", "own loss, fits", "twice", "unshifted"],
)
def test_a_model_that_does_more_with_its_logits_is_found(make: Callable[[], Any], why: str) -> None:
    model = make()
    head = find_frozen_head(model)
    assert head is not None
    assert head.off is None
    inputs = {name: t % model.config.vocab_size if name != "attention_mask" else t for name, t in batch().items()}
    head.prove(model, inputs)
    assert why in str(head.off)
    assert "forward" not in model.get_output_embeddings().__dict__
    assert "_loss_function" not in model.__dict__


def test_a_fault_inside_a_step_is_told_too() -> None:
    model = changed(InPlaceForCausalLM)
    with FrozenHead(model).catch(model, batch()["labels"]) as caught:
        model(**batch())
    assert "changes the output of lm_head" in str(caught.fault)


class LaterForCausalLM(LlamaForCausalLM):
    """Ignores the labels of a class of tokens, from its second training step on."""

    steps = 0

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        self.steps += self.training and torch.is_grad_enabled()
        if self.steps > 2 and labels is not None:
            labels = labels.masked_fill(labels < 20, IGNORED)
        return super().forward(input_ids, labels=labels, **kwargs)


def weighted_loss(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
    return 3.0 * ForCausalLMLoss(logits, labels, vocab_size, **kwargs)


@pytest.mark.parametrize("change", ["labels", "loss_function", "table"])
def test_a_loss_that_changes_during_a_run_is_followed(
    change: str, arguments: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the same run over all logits."""
    ends = []
    for over_head in (True, False):
        model = randomize(apply_lora(changed(LaterForCausalLM) if change == "labels" else helpers.tiny_llama()))

        class Changes(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                if state.global_step == 2 and change == "loss_function":
                    model.loss_function = weighted_loss
                elif state.global_step == 2 and change == "table":
                    monkeypatch.setitem(LOSS_MAPPING, "ForCausalLM", weighted_loss)

        args = arguments(max_steps=4, optim="sgd", frozen_head_loss=over_head, learning_rate=0.1, share_inputs=False)
        trainer = LoraTrainer(model, args, train_dataset=texts(), callbacks=[Changes()])
        trainer.train()
        monkeypatch.undo()
        if over_head:
            assert trainer.head_loss.head.off is not None
        ends.append(adapter_values(model))
    for name, value in ends[0].items():
        assert relative_error(value, ends[1][name]) < 1e-5, name


def test_the_proof_leaves_the_random_state_and_agrees_under_dropout() -> None:
    model = helpers.tiny_gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1).train().requires_grad_(False)
    head = FrozenHead(model)
    torch.rand(3)
    state, seed = torch.get_rng_state(), torch.initial_seed()
    head.prove(model, batch())
    assert head.off is None
    assert head.proved
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.initial_seed() == seed
    assert all(p.grad is None for p in model.parameters())
    assert float(model(**batch()).loss) != float(model(**batch()).loss)


@pytest.mark.parametrize(("off_by", "proved"), [(1e-5, True), (1e-3, False)])
def test_another_order_of_sums_is_no_other_loss(off_by: float, proved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 49,152 tokens float32 differed by 4e-6; what is really another loss differs by more than roundings do."""

    def rounded(*args: Any, **kwargs: Any) -> Any:
        scores = label_scores(*args, **kwargs)
        return scores._replace(log_probs=scores.log_probs * (1 + off_by))

    monkeypatch.setattr(loss_module, "label_scores", rounded)
    model = helpers.tiny_llama(layers=1).requires_grad_(False)
    head = FrozenHead(model)
    head.prove(model, batch())
    assert (head.off is None) is proved


def test_a_model_that_is_sure_of_its_tokens_is_proved() -> None:
    """Its loss is the small difference of large logits, so it holds fewer digits than they."""
    model = helpers.tiny_llama(layers=1).requires_grad_(False)
    model.lm_head.weight.mul_(32)
    ids = token_ids(1, 2)
    for _ in range(60):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    labels = ids.clone()
    labels[:, :20] = IGNORED
    assert 0 < float(model(ids, labels=labels).loss) < 0.1
    head = FrozenHead(model)
    head.prove(model, {"input_ids": ids, "labels": labels})
    assert head.off is None


# In training --------------------------------------------------------------------------------------------------------


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    def pad(name: str, value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)

    ids = pad("input_ids", -1)
    return {"input_ids": ids.clamp_min(0), "attention_mask": (ids >= 0).long(), "labels": pad("labels", IGNORED)}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_training_run_is_the_same_with_and_without_logits(arguments: Make, told: list[str], dropout: float) -> None:
    """Rows of different lengths, some labels ignored, two micro-batches a step: the mean is over all their tokens."""
    rows = [{n: t[: 10 - i % 4] for n, t in row.items()} for i, row in enumerate(texts().rows)]
    runs = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = randomize(apply_lora(helpers.tiny_llama(layers=1), LoraConfig(r=4, lora_dropout=dropout)))
        args = arguments(
            frozen_head_loss=ours, max_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=3,
            max_grad_norm=0.0, optim="sgd", learning_rate=0.5, name=str(ours),
        )  # fmt: skip
        trainer = LoraTrainer(model, args, train_dataset=Rows(rows), eval_dataset=Rows(rows), data_collator=padded)
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
        runs.append((adapter_values(model), trainer.state.log_history[-2]["train_loss"], evaluated))
        said = any("over the frozen lm_head in chunks" in text for text in told)
        told.clear()
        assert said == ours
    (found, *losses), (expected, *own) = runs
    assert losses == pytest.approx(own, rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
