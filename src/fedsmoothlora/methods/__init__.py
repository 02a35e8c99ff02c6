"""Federated methods: one class in one file each, a subclass of `Method`."""

from fedsmoothlora.methods.base import (
    Calibration,
    ClientView,
    LostStateError,
    Method,
    ServerUpdate,
    ServerView,
    Start,
    Traits,
    Upload,
)
from fedsmoothlora.methods.registry import MethodError, check_own, find, names, with_trait
from fedsmoothlora.update import Layer, Part, Products, Sent, Update

__all__ = [
    "Calibration",
    "ClientView",
    "Layer",
    "LostStateError",
    "Method",
    "MethodError",
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
