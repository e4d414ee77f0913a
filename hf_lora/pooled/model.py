"""A classifier on the sentence vector: the body of a checkpoint, its pooling, and a linear head.

There is one class for each body class of transformers. It derives from that body's own base class, so that its
weights, settings and attention are loaded, quantized and placed by transformers as for any other head.
"""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from ..compat import is_own_model
from ..errors import ConfigError
from .declared import OF_FILE
from .pooling import ACTIVATIONS, Pooling

_PREFIX, _SUFFIX = "Pooled", "ForSequenceClassification"
_OF_LOADING = ("dtype", "quantization_config")
"""Arguments of `from_pretrained` that a config must not take."""
OF_SOURCE = (*OF_FILE, "proxies", "trust_remote_code", "code_revision")
"""Those that a config takes, and that the weights need too."""


class PooledHead(nn.Module):
    """Pooling, dense layers and the output layer. It is saved as one module with an adapter.

    Args:
        width: of the hidden states.
        labels: number of outputs.
        dropout: of the sentence vector.
    """

    def __init__(self, pooling: Pooling, width: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.pooling = pooling
        self.dense = nn.ModuleList(nn.Linear(d.in_features, d.out_features, bias=d.bias) for d in pooling.dense)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(pooling.width(width), labels)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states [batch, tokens, width] and their mask [batch, tokens] -> logits [batch, labels]."""
        vector = self.pooling.vector(hidden, mask).to(self.out_proj.weight.dtype)
        for layer, settings in zip(self.dense, self.pooling.dense, strict=True):
            vector = ACTIVATIONS[settings.activation](layer(vector))
        if self.pooling.normalize:
            vector = nn.functional.normalize(vector, dim=-1)
        logits: Tensor = self.out_proj(self.dropout(vector))
        return logits


class PooledForSequenceClassification:
    """The part that all classes of `pooled_class` share."""

    _body: type[PreTrainedModel]
    task_type = "SEQ_CLS"
    _keys_to_ignore_on_load_unexpected = (r".",)
    """A checkpoint's head for another task, and its pooler."""

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)  # type: ignore[call-arg]
        pooling = Pooling.from_json(getattr(config, "pooling", None))
        self.num_labels = config.num_labels
        known = inspect.signature(self._body.__init__).parameters
        body = self._body(config, **({"add_pooling_layer": False} if "add_pooling_layer" in known else {}))
        setattr(self, self.base_model_prefix, body)  # type: ignore[attr-defined]
        width = config.get_text_config().hidden_size
        dropout = getattr(config, "classifier_dropout", None) or 0.0
        self.pooled_classifier = PooledHead(pooling, width, config.num_labels, dropout)
        self.post_init()  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *args: Any, pooling: Pooling | dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """As in transformers.

        Args:
            pooling: default: that in the checkpoint's config, which a merged model has.
        """
        held = {key: kwargs.pop(key) for key in _OF_LOADING if key in kwargs}
        config = kwargs.pop("config", None)
        if config is None:
            held["output_loading_info"] = kwargs.pop("output_loading_info", False)
            source = {key: kwargs[key] for key in OF_SOURCE if key in kwargs}
            config, kwargs = AutoConfig.from_pretrained(name, return_unused_kwargs=True, **kwargs)
            kwargs |= source
        if pooling is not None:
            config.pooling = pooling.to_json() if isinstance(pooling, Pooling) else pooling
        return super().from_pretrained(name, *args, config=config, **kwargs, **held)  # type: ignore[misc]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PooledHead):
            for layer in (*module.dense, module.out_proj):
                _initialize(layer, getattr(self.config, "initializer_range", 0.02))  # type: ignore[attr-defined]
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the classes for sequence classification of transformers."""
        given = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "position_ids": position_ids, "inputs_embeds": inputs_embeds,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        as_tuple = kwargs.pop("return_dict", None) is False
        out = getattr(self, self.base_model_prefix)(**given, **kwargs)  # type: ignore[attr-defined]
        logits = self.pooled_classifier(out.last_hidden_state, attention_mask)
        loss = None
        if labels is not None:
            loss = self.loss_function(  # type: ignore[attr-defined]
                labels=labels, pooled_logits=logits, logits=logits, config=self.config,  # type: ignore[attr-defined]
            )  # fmt: skip
        result = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=out.get("hidden_states"), attentions=out.get("attentions")
        )
        return result.to_tuple() if as_tuple else result


def _initialize(layer: Any, deviation: float) -> None:
    from transformers import initialization  # keeps what was loaded

    initialization.normal_(layer.weight, mean=0.0, std=deviation)
    if layer.bias is not None:
        initialization.zeros_(layer.bias)


def body_of(config: Any) -> type[PreTrainedModel] | None:
    """The class of transformers that makes the hidden states of a text; None if there is none."""
    autos: tuple[Any, ...] = (transformers.AutoModel, transformers.AutoModelForTextEncoding)
    for auto in reversed(autos) if getattr(config, "is_encoder_decoder", False) else autos[:1]:
        found = auto._model_mapping.get(type(config), None)
        if found is not None:
            return found[0] if isinstance(found, tuple) else found
    return None


@functools.cache
def pooled_class(body: Any) -> Any:
    """The classifier's class for a body class."""
    parent = next(c for c in body.__mro__[1:] if issubclass(c, PreTrainedModel))
    name = f"{_PREFIX}{body.__name__}{_SUFFIX}"
    namespace = {
        "__module__": __name__, "__qualname__": name, "__doc__": f"A {body.__name__} with a pooled classifier.",
        "_body": body, "base_model_prefix": body.base_model_prefix or "model", "config_class": body.config_class,
    }  # fmt: skip
    made = type(name, (PooledForSequenceClassification, parent), namespace)
    globals()[name] = made  # pickle finds it by its name
    return made


def class_named(name: object) -> Any:
    """The class with the name of one of `pooled_class`; None for another name."""
    if not isinstance(name, str) or not (name.startswith(_PREFIX) and name.endswith(_SUFFIX)):
        return None
    body = name[len(_PREFIX) : -len(_SUFFIX)]
    return pooled_class(getattr(transformers, body)) if is_own_model(body) else None


def __getattr__(name: str) -> Any:
    found = class_named(name)
    if found is None:
        raise AttributeError(name)
    return found


def class_for(config: Any) -> Any:
    """The classifier's class for a config.

    Raises:
        ConfigError: transformers has no body for it.
    """
    body = body_of(config)
    if body is None:
        raise ConfigError(f"a {config.model_type} has no body in transformers that a classifier could pool.")
    return pooled_class(body)  # type: ignore[arg-type]
