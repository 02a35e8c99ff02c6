"""Send the negative of the upload."""

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
class SignFlip(UploadAttack):
    """Send the upload and the head's change times ``-strength``.

    Attributes:
        kind: ``sign_flip``.
        strength: the factor. The default stays below the norm that ``uploads.max_norm_factor`` refuses.
    """

    kind: Literal["sign_flip"] = "sign_flip"
    strength: Annotated[float, Gt(0)] = 5.0

    def forged(self, reply: Reply, message: Message, layers: Mapping[str, Layer]) -> Reply:
        """See `fedsmoothlora.experiments.attack_suite.forging.scaled`."""
        from fedsmoothlora.experiments.attack_suite.forging import scaled

        return scaled(reply, message, -self.strength)
