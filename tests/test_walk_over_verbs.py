"""Random walks over the verbs with two adapters, each step held to a slow reference in float64: walk_reference.py."""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from helpers import Cut, Moments, assert_same_tensors, snapshot
from torch import Tensor, nn
from toys import Doubled, Negated, Pair, registered
from transformers.pytorch_utils import Conv1D
from walk_reference import LAYERS, Adapter, Key, Plan, Reference, is_frozen

from hf_lora import AdapterFileError, LoraConfig, StateError, apply_lora, share_inputs
from hf_lora.adapt.activation import set_active
from hf_lora.adapt.inject import delete, eject
from hf_lora.adapt.merge import disabled, merge, set_enabled, unload, unmerge
from hf_lora.adapt.state import require_state, state_of
from hf_lora.files.load import load_adapter, load_adapter_weights
from hf_lora.files.save import save_adapter
from hf_lora.layers.base import LoraLayer
from hf_lora.layers.class_swap import unwrap_class
from hf_lora.layers.copies import BiasLayer, Replacement
from hf_lora.layers.views import LoraViews

NAMES = ("one", "two")
SETS: list[tuple[str, ...]] = [("one",), ("two",), ("one", "two"), ("two", "one")]
T = TypeVar("T")
RATE = 0.1
OUTPUT_ROUNDINGS = 8
"""In the norm, each of the layers' outputs is rounded once; sums of a few products in float32 add little."""
GRADIENT_ROUNDINGS = 4 * OUTPUT_ROUNDINGS
"""Each token's share of a gradient went through the layers forth and back, begins with the output's distance from what
is wanted, which has the output's error, and is added to those of other tokens. The shares may cancel, so the error is
measured by the sum of their norms."""

PLANS = {
    # Two methods that overlap on two layers, so only one acts at a time.
    "overlapping": (
        Plan(("embedding", "doubled", "transposed", "convolution", "linear"), bias="all", whole=("head",)),
        Plan(("doubled", "negated", "linear", "beside"), "gain", r=2, alpha=3.0, ranks={"negated": 4}),
    ),
    # Both on every layer and adding up.
    "together": (
        Plan(LAYERS[:-1], bias="all", whole=("head",), ranks={"linear": 1}),
        Plan(LAYERS[:-1], r=2, alpha=1.0),
    ),
    # Two methods side by side, and biases too.
    "apart": (
        Plan(("embedding", "transposed", "convolution", "head"), bias="lora_only", r=4),
        Plan(("doubled", "negated", "linear"), "gain", bias="lora_only", ranks={"doubled": 2}),
    ),
    # One trains whole what the other adapts.
    "crossing": (
        Plan(("embedding", "convolution", "linear", "beside"), whole=("head",), ranks={"embedding": 2}),
        Plan(("doubled", "linear", "head"), bias="all", r=2),
    ),
    # What takes something out of the base, rows of an embedding, and a module with two weights.
    "taken": (
        Plan(("doubled", "negated", "linear", "pair"), init="top", rows=(1, 4), r=2),
        Plan(("embedding", "linear", "pair"), rows=(3, 9), ranks={"pair": 1}),
    ),
    "taken and scaled": (
        Plan(("linear", "pair"), "gain", init="top", rows=(2, 5)),
        Plan(("embedding", "doubled"), init="constant", rows=(5, 6), whole=("head",)),
    ),
    # Each with a head of its own.
    "heads": (
        Plan(("embedding", "doubled", "negated", "transposed"), bias="all", whole=("head",)),
        Plan(("negated", "convolution", "linear", "beside"), whole=("head",), r=2),
    ),
    # Each with a bias of its own at one layer.
    "biases": (
        Plan(("embedding", "negated", "transposed", "linear"), bias="all"),
        Plan(("doubled", "linear", "head"), bias="lora_only", alpha=2.0),
    ),
}


def labels_of(name: str | None) -> dict[str, Any]:
    """What a config says of labels with this name; None for those of the base."""
    table = {i: f"{name or 'base'} {i}" for i in range(4)}
    return {"id2label": table, "label2id": {v: k for k, v in table.items()}, "problem_type": None}


class Net(nn.Module):
    """A layer of each shape, toys among them, in a row: ids (B, T) -> (B, T, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.doubled, self.norm, self.negated = Doubled(6, 8), nn.LayerNorm(8), Negated(8, 5)
        self.transposed, self.convolution = Conv1D(7, 5), nn.Conv1d(7, 6, 3, padding=1)
        self.linear, self.beside = nn.Linear(6, 6), nn.Linear(6, 6)
        self.pair, self.head = Pair(6, 7, 6), nn.Linear(6, 4)
        self.config = SimpleNamespace(**labels_of(None))
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1 or name == "transposed.weight":  # zeros and small values would hide what is done
                nn.init.normal_(parameter, float(name == "norm.weight"), 0.4)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.doubled(self.embedding(ids)).tanh()
        h = self.negated(self.norm(h)).tanh()
        h = self.transposed(h).tanh()
        # Left out: an x that is not contiguous, for which `lora_products` is rounded otherwise than F.linear.
        h = self.convolution(h.transpose(1, 2)).transpose(1, 2).contiguous().tanh()
        y: Tensor = self.head(self.pair((self.linear(h) + self.beside(h)).tanh()).tanh())
        return y


class Walk:
    """One net on its way, and the reference beside it."""

    def __init__(self, plans: str, dtype: torch.dtype, seed: int, folder: Path) -> None:
        self.random, self.folder = random.Random(f"{plans} {dtype} {seed}"), folder
        torch.manual_seed(self.random.getrandbits(32))
        self.plans, self.dtype = dict(zip(NAMES, PLANS[plans], strict=True)), dtype
        self.model: Any = Net().to(dtype)
        self.model.norm.weight.requires_grad_(False)
        self.model.linear.bias.requires_grad_(False)
        parameters = dict(self.model.named_parameters())
        self.reference = Reference(parameters, {n: p.requires_grad for n, p in parameters.items()}, dtype)
        self.base = copy.deepcopy(self.model)
        self.ids = torch.randint(0, 11, (4, 5))
        self.saved: list[tuple[Path, Adapter]] = []
        self.left: list[tuple[nn.Module, Tensor]] = []
        """What a copy was made of, with its output: it must not change with the copy."""
        self.trace: list[str] = []

    def go(self, steps: int) -> None:
        try:
            self.check()
            verbs = self.random.choices(list(VERBS), list(VERBS.values()), k=steps)
            for verb in [Walk.inject, Walk.inject, Walk.set_active, *verbs]:
                verb(self)
                self.check()
            self.unload()
            self.check()
        except BaseException as error:
            error.add_note("The walk so far:\n" + "\n".join(f"  {i} {said}" for i, said in enumerate(self.trace)))
            raise

    def attempt(self, said: str, allowed: bool, call: Callable[[], Any], cuts: bool = True) -> bool:
        """Call, and return True; where the reference allows nothing of the kind, the library must refuse."""
        self.trace.append(said if allowed else f"{said}, to be refused")
        if allowed:
            if not cuts or self.random.random() > 0.1 or not self.cut_off(call):
                call()
            return True
        before = snapshot(self.model)
        with pytest.raises(StateError):
            call()
        assert_same_tensors(snapshot(self.model), before)
        return False

    def cut_off(self, call: Callable[[], Any]) -> bool:
        """Begin to call, and cut it off somewhere. Returns whether it is finished; else all is as it was."""
        at, before = int(2000 * self.random.random() ** 3), self.standing()
        torch.manual_seed(len(self.trace))
        try:
            with Moments(at):
                call()
        except Cut as cut:
            self.trace.append(f"cut off {cut}")
            now = self.standing()
            return (
                now[0] != before[0]
                or now[1].keys() != before[1].keys()
                or any(not torch.equal(tensor, before[1][name]) for name, tensor in now[1].items())
            )
        return True

    def standing(self) -> tuple[Any, dict[str, Tensor]]:
        state = state_of(self.model)
        activity = None if state is None else (state.activity.active, state.activity.enabled, state.activity.merged)
        adapters = None if state is None else list(state.adapters)
        modes = [(module.training, type(module)) for module in self.model.modules()]
        return (activity, adapters, modes, vars(self.model.config).copy()), snapshot(self.model)

    def pick(self, options: Sequence[T], allowed: Callable[[T], bool]) -> T:
        """One of `options`; mostly one that is allowed, as far as the reference can tell."""
        good = [option for option in options if allowed(option)]
        return self.random.choice(good if good and self.random.random() < 0.8 else options)

    # Verbs -----------------------------------------------------------------------------------------------------------

    def inject(self) -> None:
        reference = self.reference
        name = self.pick(NAMES, reference.takes)
        plan = self.plans[name]
        config = LoraConfig(
            r=plan.r, lora_alpha=plan.alpha, target_modules=list(plan.targets), method=plan.method, bias=plan.bias,
            modules_to_save=list(plan.whole), rank_pattern=dict(plan.ranks), init_lora_weights=plan.init,
            parts={"rows": {"embedding": list(plan.rows)}} if plan.rows else {},
        )  # fmt: skip
        labels = labels_of(f"inject {len(self.trace)}")["id2label"] if plan.whole else None
        said = f"inject {name}"
        if self.attempt(
            said, reference.takes(name), lambda: apply_lora(self.model, config, name, id2label=labels)
        ):  # fmt: skip
            reference.add(name, Adapter(plan, True, {}, labels[0][:-2] if labels else None))
            # A copy of a head runs in float32, in whichever dtype the net is.
            if plan.init != "top" and (not plan.whole or reference.dtype == torch.float32):
                assert torch.equal(self.model(self.ids), self.plain()(self.ids)), "a fresh adapter changed the output"
            self.randomize(name)

    @torch.no_grad()
    def randomize(self, name: str) -> None:
        """Values with which every part of an adapter acts."""
        for key in self.plans[name].owned():
            if is_frozen(key[1]):
                continue
            own = self.parameter(name, key)
            mean = torch.zeros_like(own) if key[1].startswith(("lora_A", "lora_B")) else own
            own.copy_(mean + 0.2 * torch.randn(own.shape))
        self.pull(name)

    def pull(self, name: str) -> None:
        """Take the library's values of an adapter into the reference."""
        adapter = self.reference.adapters[name]
        adapter.tensors = {key: self.parameter(name, key).detach().double() for key in adapter.plan.owned()}

    def parameter(self, name: str, key: Key) -> nn.Parameter:
        """The library's tensor of an adapter."""
        own: nn.Parameter = self.model.get_parameter(self.reference.name_of_own(name, key))
        return own

    def delete(self) -> None:
        reference = self.reference
        name = self.pick(NAMES, reference.gives)
        if self.attempt(f"delete {name}", reference.gives(name), lambda: delete(self.model, name)):
            reference.remove(name)

    def unload(self) -> None:
        if self.attempt("unload", self.reference.present, lambda: unload(self.model)):
            self.reference.end()

    def set_active(self) -> None:
        held = set(self.reference.adapters)
        names = self.pick([*SETS, (), ("one", "one")], lambda names: set(names) <= held)
        allowed = self.reference.activates(names)
        if self.attempt(
            f"set_active {names}", allowed, lambda: set_active(self.model, require_state(self.model, "walk"), names)
        ):
            self.reference.active = names

    def set_enabled(self) -> None:
        enabled = self.random.random() < 0.6
        if self.attempt(f"set_enabled {enabled}", self.reference.present, lambda: set_enabled(self.model, enabled)):
            self.reference.enabled = enabled

    def disabled(self) -> None:
        reference, before = self.reference, self.reference.enabled

        def call() -> None:
            try:
                with disabled(self.model):
                    reference.enabled = False
                    self.check()
                    self.merge()
                    self.check()
            finally:
                reference.enabled = before

        self.attempt("disabled", reference.present, call)

    def merge(self) -> None:
        """Or, where that is refused anyway, mostly the way back."""
        reference = self.reference
        if reference.merged and self.random.random() < 0.8:
            return self.unmerge()
        names = self.pick([None, (), *SETS], reference.merges)
        if self.attempt(f"merge {names}", reference.merges(names), lambda: merge(self.model, names)):
            reference.merge(names)

    def unmerge(self) -> None:
        reference = self.reference
        try:
            if self.attempt("unmerge", bool(reference.merged), lambda: unmerge(self.model)):
                reference.unmerge()
        except Cut:  # of a block around it; what is begun is completed
            if reference.merged and not require_state(self.model, "unmerge").activity.merged:
                reference.unmerge()
            raise

    def merge_for_good(self) -> None:
        """On a copy: nothing leads back."""
        reference, model = self.reference, copy.deepcopy(self.model)
        if not reference.acting:
            return
        self.trace.append("merge a copy for good")
        if not reference.merged:
            merge(model, keep=False)
        eject(model, keep_heads=True)
        self.check_plain(model)
        self.check_output(model)

    def train_step(self) -> None:
        reference, trained = self.reference, self.reference.trained
        self.trace.append(f"train {reference.acting}{' while merged' if reference.merged else ''}")
        if not reference.present:
            return
        parameters = {place: self.parameter(*place) for place in trained}
        y = self.model(self.ids)
        if reference.merged:  # copies stand beside the weights and act as ever; nothing else may learn
            own = [parameter for (_, (_, kind)), parameter in parameters.items() if kind.startswith("lora_")]
            found = torch.autograd.grad(y.sum(), own, allow_unused=True) if y.requires_grad and own else ()
            assert all(gradient is None for gradient in found)
            return
        assert y.requires_grad == bool(trained)
        if not trained:
            return
        wanted = torch.randn(y.shape, dtype=torch.float64)
        (y.double() - wanted).square().mean().backward()
        learned = {id(parameter) for parameter in self.model.parameters() if parameter.grad is not None}
        assert learned == {id(parameter) for parameter in parameters.values()}
        for place, (gradient, scale) in reference.gradients(self.ids, wanted).items():
            self.descend(place, parameters[place], gradient, scale)
        for name in {name for name, _ in trained}:
            self.pull(name)

    @torch.no_grad()
    def descend(self, place: tuple[str, Key], own: nn.Parameter, gradient: Tensor, scale: float) -> None:
        """One step of a parameter by its own gradient, against the step by the reference's."""
        name, key = place
        before = self.reference.adapters[name].tensors[key]
        assert own.grad is not None
        error = float((own.grad.double() - gradient).norm())
        assert error <= GRADIENT_ROUNDINGS * self.eps() * scale, f"{place}: the gradient is off by {error:.2e}"
        own.sub_(RATE * own.grad)
        own.grad = None
        error = float((own.double() - (before - RATE * gradient)).norm())
        allowed = RATE * GRADIENT_ROUNDINGS * self.eps() * scale + torch.finfo(torch.float32).eps * float(own.norm())
        assert error <= allowed, f"{place} is off by {error:.2e} after a step"

    def save(self) -> None:
        reference = self.reference
        name, folder = self.pick(NAMES, lambda name: name in reference.adapters), self.folder / str(len(self.trace))
        if self.attempt(f"save {name}", name in reference.adapters, lambda: save_adapter(self.model, folder, name)):
            adapter = reference.adapters[name]
            saved = Adapter(adapter.plan, True, dict(adapter.tensors), adapter.labels)
            self.saved = [*self.saved[-3:], (folder, saved)]

    def load(self) -> None:
        """Either adapter's file, under either name."""
        if not self.saved:
            return
        reference, trainable = self.reference, self.random.random() < 0.5
        name, (folder, saved) = self.pick(NAMES, reference.takes), self.random.choice(self.saved)
        said = f"load {name} from {folder.name}, is_trainable={trainable}"
        if self.attempt(
            said, reference.takes(name), lambda: load_adapter(self.model, folder, name, is_trainable=trainable)
        ):
            reference.add(name, Adapter(saved.plan, trainable, dict(saved.tensors), saved.labels))

    def load_weights(self) -> None:
        if not self.saved:
            return
        reference = self.reference
        name, (folder, saved) = self.pick(NAMES, reference.gives), self.random.choice(self.saved)
        said, allowed = f"load_adapter_weights {name} from {folder.name}", reference.gives(name)
        fits = not allowed or reference.adapters[name].plan == saved.plan
        with contextlib.nullcontext() if fits else pytest.raises(AdapterFileError):
            self.attempt(said, allowed, lambda: load_adapter_weights(self.model, folder, name))
        if fits and allowed:
            reference.adapters[name].tensors = dict(saved.tensors)

    def share(self) -> None:
        def call() -> None:
            share_inputs(self.model, self.ids)

        self.attempt("share_inputs", self.reference.present, call)

    def share_layers(self) -> None:
        """Another model has two of the layers too. It can be adapted only while this one has no adapters there."""
        other = nn.ModuleDict({path: self.model.get_submodule(path) for path in ("linear", "beside")})
        taken = any(any(self.reference.holds(path)) for path in other)
        self.trace.append(f"share layers that are {'taken' if taken else 'free'}")
        config = LoraConfig(r=1, target_modules=["linear"], modules_to_save=["beside"])
        if taken:
            with pytest.raises(StateError, match="of another model"):
                apply_lora(other, config)
            return
        apply_lora(other, config)
        if self.reference.present:
            for verb in (apply_lora, eject):
                with pytest.raises(StateError, match=r"of another model|are merged"):
                    verb(self.model)
        eject(other)

    def deepcopy(self) -> None:
        self.trace.append("deepcopy")
        self.leave(copy.deepcopy(self.model))

    def pickle(self) -> None:
        self.trace.append("pickle")
        self.leave(pickle.loads(pickle.dumps(self.model)))

    @torch.no_grad()
    def leave(self, model: nn.Module) -> None:
        """Go on with a copy."""
        self.left = [(self.model, self.model(self.ids))]
        self.model = model

    def mode(self) -> None:
        training = self.random.random() < 0.5
        allowed = not (training and self.reference.merged)
        if self.attempt(
            f"train({training})", allowed, lambda: self.model.train(training), cuts=False
        ):  # PyTorch's verb
            self.reference.training = training
        elif not self.reference.training:
            self.model.eval()  # left out: the refused call has put the root and what comes first into training mode

    def state_dict(self) -> None:
        """Through a state dict, which may be of float64; what is there before it is loaded is spoiled."""
        assign, wide = self.random.random() < 0.5, self.random.random() < 0.3
        self.trace.append(f"load_state_dict of {'float64' if wide else 'the same'}, assign={assign}")
        found = self.model.state_dict()
        tensors = {name: t.to(torch.float64 if wide else t.dtype, copy=True) for name, t in found.items()}
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(7)
        self.model.load_state_dict(tensors, assign=assign)
        if assign and wide:
            self.reference.cast(torch.float64)

    def cast(self) -> None:
        dtype = self.random.choice([torch.float64, self.dtype])
        self.trace.append(f"to {dtype}")
        self.model.to(dtype)
        self.reference.cast(dtype)

    # Checks ----------------------------------------------------------------------------------------------------------

    def eps(self) -> float:
        """That of the dtype that is coarsest on the way to the output; factors are float32 in a net of float64."""
        reference = self.reference
        dtypes = {torch.float32, reference.dtype, *([reference.coarsest] if reference.merged else [])}
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def plain(self) -> Net:
        """The net without adapters, in the present dtype; frozen where the adapted one's base is."""
        net = copy.deepcopy(self.base).to(self.reference.dtype)
        return net.requires_grad_(False) if self.reference.present else net

    def check(self) -> None:
        reference, state = self.reference, state_of(self.model)
        assert (state is not None) == reference.present
        if state is not None:
            activity = state.activity
            assert list(state.adapters) == list(reference.adapters)
            assert (activity.active, activity.enabled) == (reference.active, reference.enabled)
            assert activity.merged == reference.merged
        assert vars(self.model.config) == labels_of(reference.labels)
        self.check_modules()
        self.check_parameters()
        self.check_output(self.model)
        if not reference.adapters:
            self.check_plain(self.model)
        for model, y in self.left:
            with torch.no_grad():
                assert torch.equal(model(self.ids), y), "the original changed with its copy"

    def check_modules(self) -> None:
        for path, base in self.base.named_children():
            module = self.model.get_submodule(path)
            factors, bias, whole = self.reference.holds(path)
            assert isinstance(module, Replacement) == whole, path
            if isinstance(module, Replacement):
                assert all(type(own) is type(base) for own in module.copies.values())
                module = module.base_layer
            assert unwrap_class(type(module)) is type(base)
            assert (isinstance(module, (LoraLayer, LoraViews)), isinstance(module, BiasLayer)) == (factors, bias), path
        for name, module in self.model.named_modules():
            if "lora_" not in name:
                assert module.training == self.reference.training, name

    def check_parameters(self) -> None:
        found, expected = dict(self.model.named_parameters()), self.reference.parameters()
        assert found.keys() == expected.keys()
        assert self.model.state_dict().keys() == expected.keys()
        for name, (value, dtype, required, exact) in expected.items():
            own = found[name].detach()
            assert (own.dtype, found[name].requires_grad) == (dtype, required), name
            if exact:
                assert torch.equal(own.double(), value), f"{name} is not what it was"
                continue
            error = float((own.double() - value).norm() / value.norm())
            # A fold is rounded once, to half a unit at most; in float64 the sums before it are rounded as coarsely.
            allowed = torch.finfo(self.reference.coarsest).eps + 16 * torch.finfo(torch.float64).eps
            assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"

    def check_output(self, model: nn.Module) -> None:
        reference, expected = self.reference, self.reference.output(self.ids)
        for grad in (True, False):  # each has a forward of its own
            with torch.set_grad_enabled(grad):
                y = model(self.ids).detach()
            assert y.dtype == reference.dtype
            if not reference.acting:
                assert torch.equal(y, self.plain()(self.ids)), "the base's output is off"
            error = float((y.double() - expected).norm() / expected.norm())
            assert error <= OUTPUT_ROUNDINGS * self.eps(), f"the output is off by {error:.2e}"

    def check_plain(self, model: nn.Module) -> None:
        """No trace is left of any adapter."""
        assert [type(module) for module in model.modules()] == [type(module) for module in self.base.modules()]
        assert list(dict(model.named_parameters())) == list(self.reference.base)
        if state_of(model) is None:
            required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
            assert required == self.reference.required
            for module, base in zip(model.modules(), self.base.modules(), strict=True):
                assert vars(module).keys() == vars(base).keys()


VERBS: dict[Callable[[Walk], None], int] = {
    Walk.inject: 5,
    Walk.delete: 3,
    Walk.unload: 1,
    Walk.set_active: 8,
    Walk.set_enabled: 4,
    Walk.disabled: 2,
    Walk.merge: 7,
    Walk.unmerge: 1,
    Walk.merge_for_good: 1,
    Walk.train_step: 5,
    Walk.save: 4,
    Walk.load: 5,
    Walk.load_weights: 3,
    Walk.share: 2,
    Walk.share_layers: 1,
    Walk.deepcopy: 2,
    Walk.pickle: 2,
    Walk.mode: 2,
    Walk.state_dict: 3,
    Walk.cast: 2,
}
"""Verb -> how often it is taken."""


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    with registered():
        yield


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plans", PLANS)
def test_short_walks(plans: str, dtype: torch.dtype, seed: int, tmp_path: Path) -> None:
    Walk(plans, dtype, seed, tmp_path).go(50)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 110))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plans", PLANS)
def test_long_walks(plans: str, dtype: torch.dtype, seed: int, tmp_path: Path) -> None:
    Walk(plans, dtype, seed, tmp_path).go(200)
