"""The exceptions of this package: all of them are below ``FedSmoothLoRAError``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class FedSmoothLoRAError(Exception):
    """Base class of the errors that this package raises for its users.

    The message says what was wrong, where, and what would be right. The command line prints it without a
    traceback. Every subclass is also below the built-in exception that fits it, such as ``ValueError``.
    """


# Configuration, data and installation.


class ConfigError(FedSmoothLoRAError, ValueError):
    """A configuration or an argument is not valid; the message names the key, the value and the remedy."""


class DataError(FedSmoothLoRAError, ValueError):
    """Data cannot be used; the message names the file or source, the row and what would be right."""


class MethodError(FedSmoothLoRAError, ValueError):
    """There is no such method, or a method of another package cannot be used."""


class PackageError(FedSmoothLoRAError, RuntimeError):
    """A PyPI package, or a file of it, cannot be fetched or read; the message says what would help."""


class PrecisionError(FedSmoothLoRAError, ValueError):
    """A model's weights cannot have the requested dtype or quantization; the message names the key."""


class TrackingError(FedSmoothLoRAError, RuntimeError):
    """A requested tracker is not available; raised before training begins."""


# Mathematics and training.


class NotFiniteError(FedSmoothLoRAError, ValueError):
    """A matrix or a product has entries that are not finite: NaN, infinity, or an overflow."""


class DivergedError(FedSmoothLoRAError, RuntimeError):
    """A client's loss or weights are no longer finite."""


# Rounds and clients.


class FederationStoppedError(FedSmoothLoRAError, RuntimeError):
    """A round had too few usable uploads; the message says what to try."""


class InterruptedRunError(FedSmoothLoRAError, RuntimeError):
    """The run was asked to stop, and stopped between two clients."""


class LostStateError(FedSmoothLoRAError, RuntimeError):
    """A client cannot start because its state is lost; it does not take part until it is sent everything."""


class SpentBudgetError(FedSmoothLoRAError, RuntimeError):
    """Another round of a client would pass its ``privacy.target_epsilon``; it takes part no more."""


class ClientProcessError(FedSmoothLoRAError, RuntimeError):
    """A client's process failed or died; the message names the client and says what can be done."""


# Run folders, checkpoints, exports and reports.


class StateError(FedSmoothLoRAError, ValueError):
    """A file of a checkpoint or of a client's state is missing, truncated or altered; it is named."""


class StorageError(FedSmoothLoRAError, OSError):
    """A file cannot be written, for instance because the disk is full; the message names the path."""


class RepeatedKeyError(FedSmoothLoRAError, ValueError):
    """A JSON object has a key twice."""


class ExportError(FedSmoothLoRAError, ValueError):
    """An export is not possible; the message says what is wrong with the request or with the run folder."""


class NotKeptError(FedSmoothLoRAError, ValueError):
    """The requested model cannot be rebuilt from the files that the run kept; the message says why."""


class NoExportError(FedSmoothLoRAError, ValueError):
    """A folder was not written by ``fedsmoothlora export``."""


class WrongBaseError(FedSmoothLoRAError, ValueError):
    """An adapter was to be loaded onto a model other than the one it was trained on."""


class GenerationError(FedSmoothLoRAError, ValueError):
    """No text can be generated; the message says why, and what would work."""


class MetricError(FedSmoothLoRAError, ValueError):
    """A run recorded no metric of the requested name; the message lists those that it recorded."""


class ReportError(FedSmoothLoRAError, ValueError):
    """No report can be made of a folder; the message names the folder, the file and what is wrong with it."""


class NoRunError(ReportError):
    """There is no such run in the folder that is watched; it may have been deleted."""


# Several machines.


class WireError(FedSmoothLoRAError, ValueError):
    """Received bytes are not a valid message; the message says what is wrong with them."""


class SiteError(FedSmoothLoRAError, ValueError):
    """A site was started with invalid arguments; the message names the key of ``--node-config``."""


class BehindError(FedSmoothLoRAError, RuntimeError):
    """A site lacks server updates that the coordinator believes it has: some or all of its state is lost."""


class DisagreementError(FedSmoothLoRAError, RuntimeError):
    """Sites and coordinator have different models or labels; the message names the values of both sides."""


class KeysError(FedSmoothLoRAError, ValueError):
    """A key or certificate already exists and would be overwritten."""


class SecureAggregationError(FedSmoothLoRAError, ValueError):
    """A site leaves a session of secure aggregation, because the coordinator breaks the protocol's rules."""


class TooFewSitesError(FedSmoothLoRAError, RuntimeError):
    """Too few sites remain in a session of secure aggregation; a new session repeats the round."""


class LyingSitesError(FedSmoothLoRAError, RuntimeError):
    """Sites made shares that belong to no secret, so the sum cannot be unmasked.

    Args:
        sites: the sites, with the reasons.
    """

    def __init__(self, sites: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"client {client}: {reason}" for client, reason in sites.items()))
        self.sites = sites
