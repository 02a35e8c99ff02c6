"""Federated LoRA fine-tuning: FedSmoothLoRA (arXiv 2605.29460) and the field's other methods.

Public names are loaded on first use, so that ``import fedsmoothlora`` stays fast.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsmoothlora.algebra.lowrank import LowRank as LowRank
    from fedsmoothlora.errors import FedSmoothLoRAError as FedSmoothLoRAError
    from fedsmoothlora.experiments.compare import compare as compare
    from fedsmoothlora.experiments.tuning import tune as tune
    from fedsmoothlora.exports.export import export as export
    from fedsmoothlora.exports.loading import load_adapter as load_adapter
    from fedsmoothlora.runs.federation import Federation as Federation
    from fedsmoothlora.runs.session import run as run

# Where it is installed, PEFT imports it, and it warns of a kernel that it can do without: in logs is enough.
logging.getLogger("bitsandbytes").addHandler(logging.NullHandler())

__version__ = "0.1.0"

_HOME = {
    "compare": "fedsmoothlora.experiments.compare",
    "FedSmoothLoRAError": "fedsmoothlora.errors",
    "Federation": "fedsmoothlora.runs.federation",
    "LowRank": "fedsmoothlora.algebra.lowrank",
    "export": "fedsmoothlora.exports.export",
    "load_adapter": "fedsmoothlora.exports.loading",
    "run": "fedsmoothlora.runs.session",
    "tune": "fedsmoothlora.experiments.tuning",
}

__all__ = [
    "FedSmoothLoRAError",
    "Federation",
    "LowRank",
    "__version__",
    "compare",
    "export",
    "load_adapter",
    "run",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'fedsmoothlora' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
