"""The keys of ``[model]`` and ``[lora]``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

from fedsmoothlora.errors import ConfigError

DType = Literal["float32", "bfloat16"]
Quantization = Literal["nf4", "int8"]
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2"]
KeepWeights = Literal["auto", "device", "host", "disk"]
LayerRole = Literal["attention", "attention-qkv", "mlp", "all-linear"]
ALL_LINEAR: LayerRole = "all-linear"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The keys of ``[model]``.

    Attributes:
        source: the pretrained model: ``pkg:NAME`` (`fedsmoothlora list models`), a folder that transformers
            can load, or a model's id on the Hugging Face hub.
        revision: commit, tag or branch of a model on the hub; the newest commit unless set.
        image_size: height and width of the model's input images in pixels; a multiple of its patch size. If
            it is not the size of the checkpoint's image processor, the processor resizes and crops to this
            size instead. Unless set, the processor's own size is used, and 224 if there is no processor.
        head: ``full`` trains and averages all weights of the classifier. ``lora`` keeps it frozen at its
            random initialisation and adapts it through LoRA, if ``lora.target_modules`` names it.
        dtype: number format of the weights and of the layers' computations. ``bfloat16`` halves the model's
            memory; its weights are never changed, and LoRA factors, uploads and merged updates are kept
            beside them in float32.
        quantization: ``nf4`` holds the linear layers in 4 bits, ``int8`` in 8 bits (bitsandbytes, the extra
            ``quantized``). The head is not quantised. Quantised weights are never changed either.
        attention: implementation of the attention: ``eager``, torch's ``sdpa``, or ``flash_attention_2``,
            which needs a GPU, the package flash-attn and ``dtype = "bfloat16"``. ``auto`` is what
            transformers chooses for the model. It can change the last bits of results.
    """

    source: str
    revision: str | None = None
    image_size: Annotated[int, Ge(1)] | None = None
    head: Literal["full", "lora"] = "full"
    dtype: DType = "float32"
    quantization: Quantization | None = None
    attention: Attention = "auto"

    @property
    def untouched_by(self) -> str | None:
        """The setting because of which pretrained weights are never changed; None if they are rewritten."""
        if self.quantization is not None:
            return f"model.quantization = {self.quantization!r}"
        return None if self.dtype == "float32" else f"model.dtype = {self.dtype!r}"

    def unquantised(self) -> ModelSettings:
        """The settings of the same model in float32, for which a run is exported, on any machine."""
        return replace(self, dtype="float32", quantization=None, attention="auto")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The keys of ``[lora]``, with the names of PEFT's ``LoraConfig``.

    Attributes:
        r: rank.
        alpha: numerator of the scale: ``s = alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA.
        use_rslora: use the rank-stabilised scale (arXiv 2312.03732).
        scale: ``clients`` uses SFed-LoRA's scale (arXiv 2603.08058), ``s = alpha sqrt(N / r)``, where ``N``
            is the number of clients that take part in a round.
        dropout: dropout on the input of the LoRA branch while training.
        target_modules: the linear layers to adapt: a role, or a list of roles and names. A name is a whole
            one, or its last parts (``q_proj`` matches every layer that ends in ``.q_proj``). The roles:
            ``attention`` is the linear layers of attention, ``attention-qkv`` those that compute queries,
            keys and values, ``mlp`` the other linear layers of the blocks, ``all-linear`` every linear layer
            but the head. Roles are the same layers under every release of transformers, where names differ;
            a run records the names. A layer that has the name of a role is meant by it. A layer that shares
            its weight with another module, such as a language model's logits with its embeddings, is refused.
            If empty, only the head is trained.
        head_r: rank of the head's LoRA, if the head is a target; ``r`` unless set.
        client_ranks: the clients' LoRA ranks if they differ: one rank per client in the clients' order, or a
            rule. ``halving`` assigns r, r/2, ..., 1 in turn. ``by_size`` assigns r to the client with the
            most training rows, and proportionally lower ranks to the others. No rank may exceed ``r``, which
            is the server's rank and sets the scale of all clients, so that averages are exact.
    """

    r: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Gt(0)] = 16.0
    use_rslora: bool = False
    scale: Literal["clients"] | None = None
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] | LayerRole = ("attention-qkv",)
    head_r: Annotated[int, Ge(1)] | None = None
    client_ranks: tuple[Annotated[int, Ge(1)], ...] | Literal["halving", "by_size"] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", (self.target_modules,))

    def ranks_of(self, rows: Mapping[str, int]) -> dict[str, int]:
        """The LoRA rank of every client.

        Args:
            rows: numbers of training rows by client, in the clients' order.

        Raises:
            ConfigError: the number of ranks is not the number of clients, or a rank is above ``r``.
        """
        rule = self.client_ranks
        if rule is None:
            return dict.fromkeys(rows, self.r)
        if rule == "halving":
            steps = [self.r >> k for k in range(self.r.bit_length())]
            return {client: steps[i % len(steps)] for i, client in enumerate(rows)}
        if rule == "by_size":
            most = max(rows.values())
            return {client: max(1, round(self.r * count / most)) for client, count in rows.items()}
        if len(rule) != len(rows):
            raise ConfigError(
                f"lora.client_ranks lists {len(rule)} ranks for {len(rows)} clients; list one for each "
                "client, in the clients' order"
            )
        for client, rank in zip(rows, rule, strict=True):
            if rank > self.r:
                raise ConfigError(
                    f"lora.client_ranks: client {client} has rank {rank}, above lora.r = {self.r}, which "
                    "sets the scale and the server's rank; raise lora.r to the largest"
                )
        return dict(zip(rows, rule, strict=True))

    def for_clients(self, count: int) -> LoraSettings:
        """The same settings with their scale written as ``alpha`` and ``use_rslora``.

        ``alpha sqrt(N / r)`` is rsLoRA's scale with ``alpha sqrt(N)``.

        Args:
            count: ``N``, the number of clients that take part in a round.
        """
        if self.scale is None:
            return self
        return replace(self, alpha=self.alpha * math.sqrt(count), use_rslora=True, scale=None)

    def scale_of(self, rank: int) -> float:
        """The scale ``s`` of a layer of this rank.

        Raises ``ValueError`` if the scale depends on the number of clients (`for_clients`).
        """
        if self.scale is not None:
            raise ValueError(f"lora.scale = {self.scale!r} needs the number of clients")
        return self.alpha / math.sqrt(rank) if self.use_rslora else self.alpha / rank
