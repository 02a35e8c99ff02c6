"""The federated methods. Each is one subclass of `Method` in one file of this folder."""

from fedsmoothlora.algebra.update import Coded, Layer, Part, Products, Sent, Update
from fedsmoothlora.methods.base import (
    Calibration,
    ClientView,
    Family,
    Method,
    ServerUpdate,
    ServerView,
    Start,
    Traits,
    Upload,
)
from fedsmoothlora.methods.registry import by_family, check_own, find, names, with_trait

__all__ = [
    "Calibration",
    "ClientView",
    "Coded",
    "Family",
    "Layer",
    "Method",
    "Part",
    "Products",
    "Sent",
    "ServerUpdate",
    "ServerView",
    "Start",
    "Traits",
    "Update",
    "Upload",
    "by_family",
    "check_own",
    "find",
    "names",
    "with_trait",
]
