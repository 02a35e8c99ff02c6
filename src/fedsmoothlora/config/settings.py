"""The keys of ``[evaluation]``, ``[checkpoint]``, ``[tracking]``, ``[flower]`` and ``[machine]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """The keys of ``[evaluation]``.

    Attributes:
        batch_size: rows at once; fixed by the configuration, since it changes the last bits of a metric.
        clients: also evaluate each client's own model on its validation rows, right after its training.
        test: measure on the test set; without it, figures are means over the clients' validation rows, as
            where there is no test set. `fedsmoothlora tune` chooses that way.
        diagnostics: record figures that explain a run beside those that measure it.
    """

    batch_size: Annotated[int, Ge(1)] = 256
    clients: bool = False
    test: bool = True
    diagnostics: bool = False


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """The keys of ``[checkpoint]``.

    Attributes:
        keep: how many of the newest checkpoints are kept; the best round's is kept beside them.
        best: the metric by which a round is best: ``accuracy`` (highest) or ``loss`` (lowest).
    """

    keep: Annotated[int, Ge(1)] = 2
    best: Literal["accuracy", "loss"] = "accuracy"


@dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """The keys of ``[tracking]``.

    Attributes:
        tensorboard: write event files to ``tensorboard/`` in the run's folder.
        wandb: record the run with Weights & Biases, in ``wandb/`` in the run's folder.
        wandb_project: the project that it belongs to there.
        wandb_mode: ``offline`` writes files and touches no network; ``wandb sync`` uploads them later.
            ``online`` uploads while the run goes on.
    """

    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "fedsmoothlora"
    wandb_mode: Literal["online", "offline"] = "offline"


@dataclass(frozen=True, kw_only=True)
class FlowerSettings:
    """The keys of ``[flower]``; nothing but the Flower engine reads them.

    Attributes:
        clients: ids of the sites, who have the data; ``data.source`` is each site's own then. Empty: every
            process reads ``data.source`` and takes its client's rows, as on one machine.
        timeout: seconds that a round waits for replies; those that came by then are what the round has.
        wait: seconds that the coordinator waits, before anything is trained, for all sites to connect.
    """

    clients: tuple[str, ...] = ()
    timeout: Annotated[float, Gt(0)] = 3600.0
    wait: Annotated[float, Gt(0)] = 600.0

    def check(self) -> None:
        """Raise ``ValueError`` where one client is named twice, or not at all."""
        for client in self.clients:
            if not client.strip() or self.clients.count(client) > 1:
                raise ValueError(
                    f"flower.clients: {client!r} must be a name of its own, and stand there once"
                )


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """The keys of ``[machine]``.

    Attributes:
        threads: threads of torch's operations; fixed, since it changes the last bits of a sum.
        jobs: clients that train at once, each in a process of its own with ``threads`` threads; changes no
            result. On processors, and on Linux.
        device: ``auto`` takes a GPU where there is one.
    """

    threads: Annotated[int, Ge(1)] = 2
    jobs: Annotated[int, Ge(1)] = 1
    device: Literal["auto", "cpu"] = "auto"
