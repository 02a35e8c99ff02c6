"""The defences of an attack suite: values of the configuration by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsmoothlora.config.validation import suggestion
from fedsmoothlora.errors import ConfigError

MEAN = "mean"

_BYZANTINE = "server.byzantine"
_COUNTED = ("multi_krum", "trimmed_mean")
_AGGREGATIONS = (MEAN, "geometric_median", *_COUNTED, "median")
CLIP = "clip"
NAMES = (MEAN, CLIP, *_AGGREGATIONS[1:])

# The keys that defences set; the configuration must leave them at their defaults.
KEYS = ("server.aggregation", _BYZANTINE, "uploads.clip_to_median")


def overrides_of(defence: str, malicious: int) -> Mapping[str, Any]:
    """The values that a defence sets, by dotted key.

    Args:
        defence: ``mean`` has none, ``clip`` is ``uploads.clip_to_median``, all others are values of
            ``server.aggregation``.
        malicious: the number of malicious clients that the defence is told of.

    Raises ``ConfigError`` for an unknown name.
    """
    if defence not in NAMES:
        raise ConfigError(
            f"unknown defence {defence!r}{suggestion(defence, NAMES)} There are: {', '.join(NAMES)}"
        )
    if defence == MEAN:
        return {}
    if defence == CLIP:
        return {"uploads.clip_to_median": True}
    counted = {_BYZANTINE: malicious} if defence in _COUNTED else {}
    return {"server.aggregation": defence, **counted}
