"""Single-label classification of recordings of different lengths."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsmoothlora.data.examples import Batch, on_host, without
from fedsmoothlora.modeling.audio import takes_padding
from fedsmoothlora.tasks.objectives.classification import Classification


class RecordingClassification(Classification):
    """Classification whose outputs for a row do not depend on its padding.

    ``attention_mask`` hides padding from models that support it. Other models compute the rows of each length
    apart, without padding.
    """

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        mask = batch.get("attention_mask")
        if mask is None or takes_padding(model):
            return super()._logits(model, batch)
        inputs = without(batch, "attention_mask", "labels")
        lengths = on_host(batch)["attention_mask"].sum(dim=1)
        rows, logits = [], []
        for length in lengths.unique().tolist():
            alike = (lengths == length).nonzero().squeeze(1)
            part = {name: value[alike, :length] for name, value in inputs.items()}
            rows.append(alike)
            logits.append(super()._logits(model, part))
        return torch.cat(logits)[torch.cat(rows).argsort()]
