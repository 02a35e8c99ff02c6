"""The attacks of malicious clients, each one class in one file of this folder."""

from fedsmoothlora.experiments.attacks.base import Attack, DataAttack, Setting, Success, UploadAttack
from fedsmoothlora.experiments.attacks.registry import find, from_table, names, parsed

__all__ = [
    "Attack",
    "DataAttack",
    "Setting",
    "Success",
    "UploadAttack",
    "find",
    "from_table",
    "names",
    "parsed",
]
