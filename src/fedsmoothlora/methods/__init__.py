"""Federated methods: one class in one file each, a subclass of `Method`."""

from fedsmoothlora.algebra.update import Coded, Layer, Part, Products, Sent, Update
from fedsmoothlora.methods.base import (
    Calibration,
    ClientView,
    Method,
    ServerUpdate,
    ServerView,
    Start,
    Traits,
    Upload,
)
from fedsmoothlora.methods.registry import check_own, find, names, with_trait

__all__ = [
    "Calibration",
    "ClientView",
    "Coded",
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
    "check_own",
    "find",
    "names",
    "with_trait",
]
