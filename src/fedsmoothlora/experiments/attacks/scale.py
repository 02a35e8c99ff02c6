"""Send a multiple of the upload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt

from fedsmoothlora.experiments.attacks.base import UploadAttack

if TYPE_CHECKING:
    from fedsmoothlora.federation.messages import Message, Reply
    from fedsmoothlora.methods import Layer


@dataclass(frozen=True, kw_only=True)
class Scale(UploadAttack):
    """Send the upload and the head's change times ``factor``, to dominate the average.

    Attributes:
        kind: ``scale``.
        factor: the factor. The default is just below ``uploads.max_norm_factor``, so that only uploads of
            clients with large honest updates are refused.
    """

    kind: Literal["scale"] = "scale"
    factor: Annotated[float, Gt(0)] = 9.0

    def forged(self, reply: Reply, message: Message, layers: Mapping[str, Layer]) -> Reply:
        """See `fedsmoothlora.experiments.attack_suite.forging.scaled`."""
        from fedsmoothlora.experiments.attack_suite.forging import scaled

        return scaled(reply, message, self.factor)
