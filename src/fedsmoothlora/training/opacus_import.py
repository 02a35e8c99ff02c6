"""Import Opacus, an optional dependency, without what it does to logging."""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any

from fedsmoothlora.errors import ConfigError


def opacus_module(name: str) -> Any:
    """The module ``opacus.NAME``. Raises ``ConfigError`` if Opacus is not installed."""
    # Opacus configures the root logger when it is imported, unless that has a handler.
    root, placeholder = logging.getLogger(), logging.NullHandler()
    root.addHandler(placeholder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("opacus")
            return importlib.import_module(f"opacus.{name}")
    except ImportError as error:
        raise ConfigError(
            f"[privacy] needs Opacus, which cannot be imported ({error}): "
            "pip install 'fedsmoothlora[privacy]'"
        ) from None
    finally:
        root.removeHandler(placeholder)
