"""Names of layers that differ between releases of transformers: those of a ViT's or DINOv2's attention."""

import torch
from torch import nn
from transformers import Dinov2Config, Dinov2ForImageClassification


def parts(model: nn.Module) -> list[str]:
    """The last parts of the names of a block's linear layers: query, key, value, output, and the MLP."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name.rpartition(".")[2] for name in linear if ".0." in name]


with torch.device("meta"):
    _MODEL = Dinov2ForImageClassification(
        Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )

# q_proj, k_proj and v_proj, or query, key and value.
QKV = QUERY, KEY, VALUE = tuple(parts(_MODEL)[:3])
OUTPUT = parts(_MODEL)[3]
# A name in other releases.
NOT_QUERY = "query" if QUERY == "q_proj" else "q_proj"


def attention(block: int, part: str) -> str:
    """The name of a layer in the attention of a DINOv2 with a head, such as ``attention(0, QUERY)``."""
    (name,) = (
        name for name, _ in _MODEL.named_modules() if name.endswith(f".{part}") and ".mlp." not in name
    )
    return name.replace(".0.", f".{block}.", 1)
