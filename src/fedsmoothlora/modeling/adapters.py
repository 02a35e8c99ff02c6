"""A model with PEFT's LoRA on chosen layers and, optionally, a fully trained head."""

from __future__ import annotations

import difflib
import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from types import MappingProxyType

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization
from transformers.pytorch_utils import Conv1D

from fedsmoothlora.algebra.lowrank import LowRank, with_core
from fedsmoothlora.errors import ConfigError, PrecisionError
from fedsmoothlora.methods import Layer, Method, Part, Products, with_trait
from fedsmoothlora.modeling.backbone import Backbone, MergedBackbone, shape_of
from fedsmoothlora.modeling.compiling import CompiledForward
from fedsmoothlora.modeling.roles import ROLES, is_part, layers_of_role, linear_layers, named, no_such_role
from fedsmoothlora.modeling.settings import ALL_LINEAR, KeepWeights, LoraSettings
from fedsmoothlora.modeling.unmerged import UnmergedBackbone, compute_alike

_ADAPTER = "default"  # PEFT's name for a model's first adapter; here the one of the server's rank
_SAME_OUTPUT = 0.02  # how far a layer's output may be from x W^T + b, in bfloat16 too
_HEAD_ALONE = "to train the head alone, set target_modules = []"


def client_ranks(settings: LoraSettings, method: Method, rows: Mapping[str, int]) -> dict[str, int]:
    """The LoRA rank of every client if ``lora.client_ranks`` is set, otherwise an empty dictionary.

    Raises ``ConfigError`` as `LoraSettings.ranks_of` does, and if the method needs equal ranks.
    """
    if settings.client_ranks is None:
        return {}
    if not method.traits.client_ranks:
        able = with_trait("client_ranks")
        raise ConfigError(
            f"lora.client_ranks does not work with method {method.name!r}, whose clients must all have one "
            f"rank; it goes with {', '.join(able)}"
        )
    return settings.ranks_of(rows)


def find_layers(
    model: nn.Module, settings: LoraSettings, head: Sequence[str], *, head_is_trained_whole: bool
) -> dict[str, Layer]:
    """The layers that ``settings`` adapts, with their shapes, ranks and scales. The model is not changed.

    PEFT accepts ``target_modules`` if one of its entries matches. Here every entry must match at least one
    linear layer, and no entry may match a fully trained one.

    Args:
        model: the model (its parameters may be on the meta device).
        settings: ``[lora]``.
        head: names of the head's modules.
        head_is_trained_whole: whether all weights of the head are trained.

    Raises:
        ConfigError: an entry of ``target_modules`` or a rank is wrong for this model.
    """
    linear = linear_layers(model)
    chosen: set[str] = set()
    for entry in settings.target_modules:
        matches = named(entry, linear)
        if entry in ROLES and not matches:
            matches = layers_of_role(entry, model, linear, head)
        if not matches:
            raise ConfigError(f"lora.target_modules: {_no_match(entry, model, list(linear))}")
        chosen |= matches
    layers = {}
    for name, module in linear.items():
        if name not in chosen:
            continue
        is_head = is_part(name, head)
        if is_head and head_is_trained_whole:
            raise ConfigError(
                f"lora.target_modules: {name} is the head, which model.head = 'full' trains whole: a layer "
                "cannot be both; take it out of target_modules, or set model.head = 'lora'"
            )
        _check_linear(name, module)
        rank = settings.head_r or settings.r if is_head else settings.r
        m, n = shape_of(module)
        if rank > min(m, n):
            key = "lora.head_r" if is_head and settings.head_r else "lora.r"
            raise ConfigError(
                f"{key}: layer {name} is {m} x {n}, so its rank is at most {min(m, n)}; got {rank}"
            )
        layers[name] = Layer(
            name=name,
            m=m,
            n=n,
            rank=rank,
            scale=settings.scale_of(rank),
            gradient_rank=min(m - 1, n) if _gives_logits_of_softmax(name, m, model, head) else min(m, n),
        )
    return layers


def _check_linear(name: str, module: nn.Module) -> None:
    """Refuse a layer that computes something else than ``x W^T + b``, such as one that scales its weight.

    LoRA adds ``s B A x`` to its output and a round adds ``s B A`` to its weight, which would differ.

    Raises ``ConfigError`` with the layer's name.
    """
    if "weight" not in module._parameters:
        raise ConfigError(
            f"lora.target_modules: the weight of layer {name} is computed from other parameters (such as by "
            "weight_norm), so an update cannot be added to it: remove the parametrisation, or take the layer "
            "out of target_modules"
        )
    weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
    is_plain = type(module).forward in (nn.Linear.forward, Conv1D.forward)
    if is_plain or type(weight) is not nn.Parameter or not _has_address(weight):
        return
    n = shape_of(module)[1]
    x = torch.linspace(-1, 1, 2 * n, dtype=weight.dtype, device=weight.device).view(2, n)
    was_training = module.training
    with torch.no_grad():
        expected = nn.functional.linear(x, weight, bias)
        difference = (module.eval()(x) - expected).norm()
    module.train(was_training)
    if not difference <= _SAME_OUTPUT * expected.norm():
        raise ConfigError(
            f"lora.target_modules: layer {name} ({type(module).__name__}) does not compute x W^T + b, so an "
            "update of its weight would not do what LoRA does: take it out of target_modules"
        )


def _gives_logits_of_softmax(name: str, m: int, model: nn.Module, head: Sequence[str]) -> bool:
    """Whether a layer's outputs go into a softmax; the rows of its gradient sum to zero then."""
    config = getattr(model, "config", None)
    if getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
        return False
    # Heads of several layers, as RoBERTa's, end in the one with as many outputs as classes.
    return name in head or (is_part(name, head) and m == getattr(config, "num_labels", None))


def check_not_shared(model: nn.Module, layers: Iterable[str]) -> None:
    """Refuse layers that share their weight with another module.

    LoRA on such a layer would not change the other module's output, but a merged update would change both.

    Args:
        model: the model (its parameters may be on the meta device, where only tied parameters are found).
        layers: names of the adapted layers.

    Raises:
        ConfigError: a layer shares its weight; the message names both modules and the remedy.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_identity: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        by_identity.setdefault(id(parameter), []).append(name)
    spans = sorted((*_span(value), name) for name, value in parameters.items() if _has_address(value))
    starts = [start for start, _, _ in spans]
    for layer in layers:
        weight = model.get_submodule(layer).get_parameter("weight")
        sharing = set(by_identity[id(weight)])
        if _has_address(weight):
            first, last = _span(weight)
            before = spans[: bisect_left(starts, last)]
            sharing |= {name for start, end, name in before if start < end and end > first}
        for other in sorted(sharing - {f"{layer}.weight"}):
            raise ConfigError(
                f"lora.target_modules: layer {layer} shares its weight with {other.rpartition('.')[0]}, "
                "which would change with it: take the layer out of target_modules, or give each module a "
                "weight of its own (for a language model, tie_word_embeddings = false in its config.json "
                "and both weights in its checkpoint)"
            )


def _has_address(value: Tensor) -> bool:
    """Whether the values lie in memory, unlike those of meta tensors and of tensors that wrap others."""
    return not value.is_meta and value.data_ptr() != 0


def _span(value: Tensor) -> tuple[int, int]:
    """The first address of a tensor's values and the one after the last; equal for an empty tensor."""
    first = value.data_ptr()
    if not value.numel():
        return first, first
    strides = zip(value.shape, value.stride(), strict=True)
    return first, first + (sum((size - 1) * stride for size, stride in strides) + 1) * value.element_size()


class AdaptedModel:
    """A model with LoRA on its adapted layers and, optionally, a fully trained head; all else is frozen.

    If clients have LoRA of different ranks, the model has one PEFT adapter for each rank, with an ``alpha``
    that gives all adapters the same scale. `use_rank` selects the active one.

    Args:
        model: the model.
        settings: ``[lora]``.
        head: names of the head's modules.
        head_is_trained_whole: whether all weights of the head are trained.
        ranks: the clients' ranks if some are below ``settings.r``.
        keep_weights: ``machine.keep_weights``, the place of the pretrained weights of layers that are
            rewritten.
        compile: ``machine.compile``: training calls the model compiled.

    Attributes:
        model: the model with adapters injected.
        layers: the adapted layers by name, at the server's rank.
        backbone: their global weights.
        head_parts: the head's modules by name if the head is trained whole; empty otherwise.
        dropout: ``lora.dropout``.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: LoraSettings,
        *,
        head: Sequence[str] = (),
        head_is_trained_whole: bool = True,
        ranks: Collection[int] = (),
        keep_weights: KeepWeights = "auto",
        compile: bool = False,
    ) -> None:
        self.layers = find_layers(model, settings, head, head_is_trained_whole=head_is_trained_whole)
        check_not_shared(model, self.layers)
        self._adapters = {rank: f"rank_{rank}" for rank in sorted(ranks)} | {settings.r: _ADAPTER}
        self._active = _ADAPTER
        model.requires_grad_(False)
        avoid_fast_path(model)
        if self.layers:
            transposed = all(isinstance(model.get_submodule(name), Conv1D) for name in self.layers)
            configs = {
                adapter: _peft_config(settings, self.layers_at(rank), transposed)
                for rank, adapter in self._adapters.items()
            }
            tuner = LoraModel(model, configs, _ADAPTER)
            for adapter in configs.keys() - {_ADAPTER}:
                tuner.inject_adapter(model, adapter)
        self.model: nn.Module = model
        self._lora: dict[str, LoraLayer] = {
            name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
        }
        for lora in self._lora.values():  # PEFT creates factors in the model's dtype
            lora.lora_A.float()
            lora.lora_B.float()
        for rank in self._adapters:
            self._check_injection(rank)
        self.modules: dict[str, nn.Module] = {
            name: lora.get_base_layer() for name, lora in self._lora.items()
        }
        compute_alike(model)
        self.backbone: Backbone = self._backbone(keep_weights)
        self.dropout = settings.dropout
        self.head_parts: dict[str, nn.Module] = (
            {part: model.get_submodule(part) for part in head} if head_is_trained_whole else {}
        )
        self._head: dict[str, nn.Parameter] = {}
        if head_is_trained_whole:
            for part in head:
                _keep_float32(model.get_submodule(part))
                for name, parameter in model.get_submodule(part).named_parameters():
                    parameter.requires_grad_(True)
                    self._head[f"{part}.{name}"] = parameter
        self._compiled = self._compiled_forward() if compile else None

    def calls_for_training(self) -> AbstractContextManager[None]:
        """The context in which training calls the model; calls are compiled there with ``compile``."""
        return nullcontext() if self._compiled is None else self._compiled.called()

    def _compiled_forward(self) -> CompiledForward:
        if not isinstance(self.backbone, MergedBackbone):
            raise ConfigError(
                "machine.compile = true: the adapted layers are not float32, so updates are computed beside "
                "them in a shape that changes with every round and client: leave it out"
            )
        return CompiledForward(self.model)

    def _backbone(self, keep_weights: KeepWeights) -> Backbone:
        if are_rewritten(self.modules.values()):
            return MergedBackbone(self.modules, self.layers, keep_weights)
        if keep_weights != "auto":
            raise ConfigError(
                f"machine.keep_weights = {keep_weights!r}: the adapted layers are not float32, so their "
                "weights are never changed nor copied: leave it out"
            )
        return UnmergedBackbone(self.modules, self.layers)

    def layers_at(self, rank: int) -> dict[str, Layer]:
        """The adapted layers of a client with this LoRA rank: no layer's rank is higher."""
        return {name: replace(layer, rank=min(layer.rank, rank)) for name, layer in self.layers.items()}

    def use_rank(self, rank: int) -> None:
        """Activate the adapter of this rank, one of ``ranks`` or the server's."""
        self._active = self._adapters[rank]
        for lora in self._lora.values():
            lora.set_adapter(self._active)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters: ``LAYER.lora_B``, ``LAYER.lora_A``, ``LAYER.weight``, and the head's names.

        The matrix between the factors is ``LAYER.lora_R``, its numbers ``g_i`` are ``LAYER.lora_gains``.
        """
        found: dict[str, nn.Parameter] = dict(self._head)
        for name, module in self.modules.items():
            B, A = self._factors(name)
            parts = {f"{name}.lora_B": B, f"{name}.lora_A": A, f"{name}.weight": module.weight}
            if (core := self._core(name)) is not None:
                parts |= {f"{name}.lora_R": core.R, f"{name}.lora_gains": core.gains}
            found |= {key: part for key, part in parts.items() if isinstance(part, nn.Parameter)}
        return {key: parameter for key, parameter in found.items() if parameter.requires_grad}

    def train_only(self, parts: Sequence[Part]) -> None:
        """Train only ``parts`` of the adapted layers.

        These are the LoRA factors ``B``, ``A``, the matrix ``R`` between them, or the weights ``W``.
        """
        for name, module in self.modules.items():
            B, A = self._factors(name)
            B.requires_grad_("B" in parts)
            A.requires_grad_("A" in parts)
            if (core := self._core(name)) is not None:
                core.R.requires_grad_("R" in parts)
                core.gains.requires_grad_("R" in parts and len(core.gains) > 1)
            weight = module.weight
            assert isinstance(weight, Tensor)
            weight.requires_grad_("W" in parts)

    def at_factors(self, values: Products) -> dict[nn.Parameter, Tensor]:
        """Values of the shapes of both factors, by the trained factor that they belong to."""
        pairs = (
            (factor, value)
            for name, product in values.items()
            for factor, value in zip(self._factors(name), (product.B, product.A), strict=True)
        )
        return {factor: value for factor, value in pairs if isinstance(factor, nn.Parameter)}

    def lora(self) -> dict[str, LowRank]:
        """A copy of every layer's factors; a matrix ``R`` between them belongs to ``A``."""
        found = {}
        for name in self.layers:
            B, A = (factor.detach().clone() for factor in self._factors(name))
            core = self._core(name)
            found[name] = LowRank(B, A if core is None else core(A).detach())
        return found

    def cores(self) -> dict[str, Tensor]:
        """A copy of the matrix ``R`` of every layer that has one."""
        cores = {name: self._core(name) for name in self.layers}
        return {name: core.value().detach().clone() for name, core in cores.items() if core is not None}

    @torch.no_grad()
    def load_lora(self, lora: Products, cores: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Set every layer's factors, and the matrix ``R`` of ``B R A`` in the layers of ``cores``.

        Raises ``ConfigError`` with the layer's name if a shape is wrong.
        """
        for name in self.layers:
            B, A = self._factors(name)
            product = lora[name]
            if product.B.shape != B.shape or product.A.shape != A.shape:
                raise ConfigError(
                    f"layer {name}: LoRA factors {tuple(B.shape)} and {tuple(A.shape)} expected; "
                    f"got {tuple(product.B.shape)} and {tuple(product.A.shape)}"
                )
            B.copy_(product.B)
            A.copy_(product.A)
            if name in cores:
                self._set_core(name, cores[name])
            elif (core := self._core(name)) is not None:
                core.load(torch.eye(core.R.shape[1]).to(A).repeat(len(core.gains), 1))

    def head(self) -> dict[str, Tensor]:
        """A copy of the fully trained head's parameters."""
        return {name: parameter.detach().clone() for name, parameter in self._head.items()}

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters of the fully trained head."""
        return list(self._head.values())

    def shared_head(self) -> str:
        """The name of a parameter of the fully trained head that another module has too; empty if none is."""
        named = list(self.model.named_parameters(remove_duplicate=False))
        uses = Counter(id(parameter) for _, parameter in named)
        return next((name for name, parameter in self._head.items() if uses[id(parameter)] > 1), "")

    @torch.no_grad()
    def load_head(self, head: Mapping[str, Tensor]) -> None:
        """Set the head's parameters."""
        for name, parameter in self._head.items():
            parameter.copy_(head[name])

    @contextmanager
    def without_lora(self) -> Iterator[None]:
        """Disable LoRA, so that the model computes with the backbone alone; restore it at the end."""
        factors = [factor for name in self._lora for factor in self._factors(name)]
        cores = [core for name in self._lora if (core := self._core(name)) is not None]
        factors += [part for core in cores for part in (core.R, core.gains)]
        trained = [factor.requires_grad for factor in factors]
        for lora in self._lora.values():
            lora.enable_adapters(False)
        try:
            yield
        finally:
            for lora in self._lora.values():
                lora.enable_adapters(True)
            for factor, flag in zip(factors, trained, strict=True):  # PEFT unfreezes all of them
                factor.requires_grad_(flag)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        lora = self._lora[name]
        B, A = lora.lora_B[self._active], lora.lora_A[self._active]
        if is_parametrized(A):
            return B.weight, A.parametrizations["weight"].original
        return B.weight, A.weight

    def _core(self, name: str) -> Core | None:
        """The matrix ``R`` of a layer whose LoRA is ``B R A``; None if it is ``B A``."""
        A = self._lora[name].lora_A[self._active]
        return A.parametrizations["weight"][0] if is_parametrized(A) else None

    def _set_core(self, name: str, R: Tensor) -> None:
        """Make the LoRA of a layer ``B R A``: its ``lora_A`` computes with ``R A``, of which both remain."""
        _, A = self._factors(name)
        if R.ndim != 2 or len(R) != len(A) or len(A) % R.shape[1]:
            raise ConfigError(
                f"layer {name}: a matrix ({len(A)}, {len(A)}) between the LoRA factors expected, or equal "
                f"blocks of it; got {tuple(R.shape)}"
            )
        if self._core(name) is None:
            register_parametrization(
                self._lora[name].lora_A[self._active], "weight", Core(R.to(A), len(A) // R.shape[1])
            )
        core = self._core(name)
        assert core is not None
        core.load(R)

    def _check_injection(self, rank: int) -> None:
        """Check that PEFT's layers have the names, ranks and scales of `find_layers`."""
        adapter = self._adapters[rank]
        made = {name: (lora.r[adapter], lora.scaling[adapter]) for name, lora in self._lora.items()}
        asked = {name: (layer.rank, layer.scale) for name, layer in self.layers_at(rank).items()}
        if made.keys() != asked.keys() or any(
            made[name][0] != rank or not math.isclose(made[name][1], scale)
            for name, (rank, scale) in asked.items()
        ):
            raise RuntimeError(f"PEFT adapted {made}; it should be {asked} instead")


class Core(nn.Module):
    """The matrix ``R`` of a LoRA ``B R A``, as a parametrisation of ``A`` (``torch.nn.utils.parametrize``).

    With several blocks, ``R`` is the diagonal of ``g_i R_i``, and the numbers ``g_i`` are trained too.

    Args:
        R: the square blocks below each other, ``(r, r / blocks)``.
        blocks: their number.
    """

    def __init__(self, R: Tensor, blocks: int) -> None:
        super().__init__()
        self.R = nn.Parameter(R.clone())
        self.gains = nn.Parameter(R.new_ones(blocks))

    def load(self, R: Tensor) -> None:
        """Set the blocks; the numbers ``g_i`` are 1 again."""
        self.R.copy_(R)
        nn.init.ones_(self.gains)

    def value(self) -> Tensor:
        """The blocks ``g_i R_i`` below each other."""
        return self.R * self.gains.repeat_interleave(self.R.shape[1])[:, None]

    def forward(self, A: Tensor) -> Tensor:
        """``R A``, ``(r, n)``."""
        return with_core(self.value(), A)


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move the model if it is not on the device: a needless ``to`` breaks bitsandbytes' layers after use."""
    device = torch.empty(0, device=device).device  # resolves "cuda" to one device, such as "cuda:0"
    return model if all(value.device == device for value in model.parameters()) else model.to(device)


def are_rewritten(modules: Iterable[nn.Module]) -> bool:
    """Whether the layers' own weights may be rewritten: only in float32, where rounding is negligible."""
    return all(module.get_parameter("weight").dtype == torch.float32 for module in modules)


def _keep_float32(part: nn.Module) -> None:
    """Train a part of the head in float32, whatever the dtype of the rest of the model."""
    if all(parameter.dtype == torch.float32 for parameter in part.parameters()):
        return
    if not all(parameter.is_floating_point() for parameter in part.parameters()):
        raise PrecisionError(
            "the head has quantised weights, so they cannot be trained: quantise all layers but the head"
        )
    part.float()
    part.register_forward_pre_hook(lambda module, inputs: tuple(value.float() for value in inputs))


def _peft_config(settings: LoraSettings, layers: Mapping[str, Layer], transposed: bool) -> LoraConfig:
    # A regular expression that matches whole names only. PEFT matches the entries of a list by suffix too.
    exactly = "|".join(re.escape(name) for name in layers)
    # PEFT computes the scale from alpha and rank, so alpha is computed here from `Layer.scale`.
    alphas = {
        layer.name: layer.scale * (math.sqrt(layer.rank) if settings.use_rslora else layer.rank)
        for layer in layers.values()
    }
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        use_rslora=settings.use_rslora,
        lora_dropout=settings.dropout,
        target_modules=f"^(?:{exactly})$",
        rank_pattern={
            f"^{re.escape(layer.name)}$": layer.rank for layer in layers.values() if layer.rank != settings.r
        },
        alpha_pattern={
            f"^{re.escape(name)}$": alpha for name, alpha in alphas.items() if alpha != settings.alpha
        },
        fan_in_fan_out=transposed,
    )


def avoid_fast_path(model: nn.Module) -> None:
    """Switch off PyTorch's fast path for evaluation if the model has layers whose weights it reads itself.

    It never calls the layers inside ``nn.TransformerEncoderLayer``, so LoRA on them would have no effect.
    """
    if any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules()):
        torch.backends.mha.set_fastpath_enabled(False)


def _no_match(entry: str, model: nn.Module, linear: Sequence[str]) -> str:
    """The message for an entry of ``target_modules`` that matches no linear layer."""
    kinds = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if not linear:
        return f"{entry!r} matches no layer: {type(model).__name__} has no linear layer; {_HEAD_ALONE}"
    if entry == ALL_LINEAR:
        return (
            f"{entry!r} matches no layer: all linear layers of {type(model).__name__} belong to its head, "
            f"and other layers, such as convolutions, are not adapted; {_HEAD_ALONE}"
        )
    if entry in ROLES:
        return no_such_role(entry, model, linear)
    modules = model.named_modules(remove_duplicate=False)
    others = [module for name, module in modules if name == entry or name.endswith(f".{entry}")]
    if first := next((name for name in linear if model.get_submodule(name) in others), None):
        return f"{entry!r} is another name of the module {first}: LoRA cannot adapt it under one name only"
    if others:
        kind = type(others[0]).__name__
        if isinstance(others[0], nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return (
                f"{entry!r} is a convolution ({kind}), and convolutions are not adapted; the linear layers "
                f"are {', '.join(kinds)}"
            )
        if isinstance(others[0], nn.Linear):
            return (
                f"{entry!r} belongs to nn.MultiheadAttention, which reads its weight and never calls it, so "
                f"LoRA would have no effect; the other linear layers are {', '.join(kinds)}"
            )
        return (
            f"{entry!r} is not a linear layer; the linear layers are {', '.join(kinds)} ({entry} is {kind})"
        )
    close = difflib.get_close_matches(entry, kinds, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{entry!r} matches no layer{hint} The linear layers are {', '.join(kinds)}"
