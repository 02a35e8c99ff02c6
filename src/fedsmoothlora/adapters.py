"""A model with LoRA on chosen layers (by PEFT) and, if wanted, a head that is trained whole."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Interval
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedsmoothlora.backbone import Backbone, RewrittenBackbone
from fedsmoothlora.lowrank import LowRank
from fedsmoothlora.methods import Layer, Part, Products

_ADAPTER = "default"  # PEFT's name for the only adapter of a model
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The keys of ``[lora]``, in PEFT's names.

    Attributes:
        r: rank.
        alpha: scale numerator: ``s = alpha / r``, with rsLoRA ``alpha / sqrt(r)``.
        use_rslora: rank-stabilised scale (arXiv 2312.03732).
        dropout: on the input of the LoRA branch while training.
        target_modules: names of the linear layers to adapt: whole names, or their last parts
            (``q_proj`` matches every layer that ends in ``.q_proj``). ``all-linear`` stands for every linear
            layer but the head. Empty: the head alone is trained.
        head_r: rank of the head's LoRA where it is a target; ``r`` unless set.
    """

    r: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Gt(0)] = 16.0
    use_rslora: bool = False
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    head_r: Annotated[int, Ge(1)] | None = None

    def scale(self, rank: int) -> float:
        """``s`` of a layer of that rank."""
        return self.alpha / math.sqrt(rank) if self.use_rslora else self.alpha / rank


def find_layers(
    model: nn.Module, settings: LoraSettings, head: Sequence[str], *, head_is_trained_whole: bool
) -> dict[str, Layer]:
    """The layers that ``settings`` adapts, with their shapes, ranks and scales, without touching the model.

    PEFT is content when one of several ``target_modules`` matches; here every entry must match at least one
    linear layer, and none that is trained whole.

    Args:
        model: the model (its parameters may be on the meta device).
        settings: ``[lora]``.
        head: names of the head's modules.
        head_is_trained_whole: whether these are trained as they are.

    Raises:
        ValueError: names the entry of ``target_modules`` or the layer, and what would be right.
    """
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    chosen: set[str] = set()
    for entry in settings.target_modules:
        if entry == ALL_LINEAR:
            # A language model's logits are its head, whether or not anybody said so.
            logits = getattr(model, "get_output_embeddings", lambda: None)()
            chosen |= {n for n, m in linear.items() if not _is_part(n, head) and m is not logits}
            continue
        matches = {name for name in linear if name == entry or name.endswith(f".{entry}")}
        if not matches:
            raise ValueError(f"lora.target_modules: {_no_match(entry, model, list(linear))}")
        chosen |= matches
    layers = {}
    for name, module in linear.items():
        if name not in chosen:
            continue
        is_head = _is_part(name, head)
        if is_head and head_is_trained_whole:
            raise ValueError(
                f"lora.target_modules: {name} is the head, which model.head = 'full' trains whole: a layer "
                "cannot be both; take it out of target_modules, or set model.head = 'lora'"
            )
        rank = settings.head_r or settings.r if is_head else settings.r
        m, n = _shape(module)
        if rank > min(m, n):
            key = "lora.head_r" if is_head and settings.head_r else "lora.r"
            raise ValueError(
                f"{key}: layer {name} is {m} x {n}, so its rank is at most {min(m, n)}; got {rank}"
            )
        layers[name] = Layer(
            name=name,
            m=m,
            n=n,
            rank=rank,
            scale=settings.scale(rank),
            # The rows of a softmax head's gradient sum to zero.
            gradient_rank=min(m - 1, n) if name in head else min(m, n),
        )
    return layers


class AdaptedModel:
    """A model whose adapted layers carry LoRA and whose head may be trained whole; all else is frozen.

    Attributes:
        model: the model, adapters injected.
        layers: the adapted layers, by name.
        backbone: their global weights.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: LoraSettings,
        *,
        head: Sequence[str] = (),
        head_is_trained_whole: bool = True,
    ) -> None:
        self.layers = find_layers(model, settings, head, head_is_trained_whole=head_is_trained_whole)
        model.requires_grad_(False)
        if self.layers:
            transposed = all(isinstance(model.get_submodule(name), Conv1D) for name in self.layers)
            model = inject_adapter_in_model(_peft_config(settings, self.layers, transposed), model, _ADAPTER)
        self.model: nn.Module = model
        self._lora: dict[str, LoraLayer] = {
            name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
        }
        self._check_injection()
        self.modules: dict[str, nn.Module] = {
            name: lora.get_base_layer() for name, lora in self._lora.items()
        }
        self.backbone: Backbone = RewrittenBackbone(self.modules, self.layers)
        self._head: dict[str, nn.Parameter] = {}
        if head_is_trained_whole:
            for part in head:
                for name, parameter in model.get_submodule(part).named_parameters():
                    parameter.requires_grad_(True)
                    self._head[f"{part}.{name}"] = parameter

    def trained_parameters(self) -> list[nn.Parameter]:
        """The LoRA factors and the head's parameters."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def train_only(self, parts: Sequence[Part]) -> None:
        """Freeze all of the adapted layers but ``parts``: LoRA's factors, or the weights themselves."""
        for name, module in self.modules.items():
            B, A = self._factors(name)
            B.requires_grad_("B" in parts)
            A.requires_grad_("A" in parts)
            weight = module.weight
            assert isinstance(weight, Tensor)
            weight.requires_grad_("W" in parts)

    def lora(self) -> dict[str, LowRank]:
        """A copy of every layer's factors."""
        return {name: LowRank(*(f.detach().clone() for f in self._factors(name))) for name in self.layers}

    @torch.no_grad()
    def load_lora(self, lora: Products) -> None:
        """Set every layer's factors. Raises ``ValueError`` that names the layer where a shape is wrong."""
        for name in self.layers:
            B, A = self._factors(name)
            product = lora[name]
            if product.B.shape != B.shape or product.A.shape != A.shape:
                raise ValueError(
                    f"layer {name}: LoRA factors {tuple(B.shape)} and {tuple(A.shape)} expected; "
                    f"got {tuple(product.B.shape)} and {tuple(product.A.shape)}"
                )
            B.copy_(product.B)
            A.copy_(product.A)

    def head(self) -> dict[str, Tensor]:
        """A copy of the head's parameters that are trained whole."""
        return {name: parameter.detach().clone() for name, parameter in self._head.items()}

    @torch.no_grad()
    def load_head(self, head: Mapping[str, Tensor]) -> None:
        """Set the head's parameters."""
        for name, parameter in self._head.items():
            parameter.copy_(head[name])

    @contextmanager
    def without_lora(self) -> Iterator[None]:
        """The model as its backbone alone computes it."""
        for lora in self._lora.values():
            lora.enable_adapters(False)
        try:
            yield
        finally:
            for lora in self._lora.values():
                lora.enable_adapters(True)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        lora = self._lora[name]
        return lora.lora_B[_ADAPTER].weight, lora.lora_A[_ADAPTER].weight

    def _check_injection(self) -> None:
        """What PEFT made must be what `find_layers` said: names, ranks, scales."""
        made = {name: (lora.r[_ADAPTER], lora.scaling[_ADAPTER]) for name, lora in self._lora.items()}
        asked = {name: (layer.rank, layer.scale) for name, layer in self.layers.items()}
        if made.keys() != asked.keys() or any(
            made[name][0] != rank or not math.isclose(made[name][1], scale)
            for name, (rank, scale) in asked.items()
        ):
            raise RuntimeError(f"PEFT adapted {made}, where {asked} was asked for")


def _peft_config(settings: LoraSettings, layers: Mapping[str, Layer], transposed: bool) -> LoraConfig:
    # An expression that matches whole names only: PEFT matches a list entry by suffix too.
    exactly = "|".join(re.escape(name) for name in layers)
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        use_rslora=settings.use_rslora,
        lora_dropout=settings.dropout,
        target_modules=f"^(?:{exactly})$",
        rank_pattern={
            f"^{re.escape(layer.name)}$": layer.rank for layer in layers.values() if layer.rank != settings.r
        },
        fan_in_fan_out=transposed,
    )


def _is_part(name: str, head: Sequence[str]) -> bool:
    """Whether a module belongs to one of the head's."""
    return any(name == part or name.startswith(f"{part}.") for part in head)


def _shape(module: nn.Module) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _no_match(entry: str, model: nn.Module, linear: Sequence[str]) -> str:
    """Why an entry of ``target_modules`` is refused, and what there is."""
    kinds = sorted({name.rsplit(".", 1)[-1] for name in linear})
    others = [n for n, m in model.named_modules() if n == entry or n.endswith(f".{entry}")]
    if others:
        return f"{entry!r} is not a linear layer; the linear layers are {', '.join(kinds)}"
    close = difflib.get_close_matches(entry, kinds, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{entry!r} matches no layer{hint} The linear layers are {', '.join(kinds)}"
