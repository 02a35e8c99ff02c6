"""The keys of ``[evaluation]``, ``[checkpoint]``, ``[tracking]``, ``[flower]`` and ``[machine]``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, MinLen

_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """The keys of ``[checkpoint]``.

    Attributes:
        keep: number of newest checkpoints that are kept, beside that of the best round.
        best: metric that decides which round is best, such as ``accuracy`` or ``loss``; one that the task
            measures in every round. Whether more or less of it is better follows from the metric.
    """

    keep: Annotated[int, Ge(1)] = 2
    best: str = "accuracy"


@dataclass(frozen=True, kw_only=True)
class TrackingSettings:
    """The keys of ``[tracking]``.

    Attributes:
        tensorboard: write TensorBoard event files to ``tensorboard/`` in the run's folder.
        wandb: record the run with Weights & Biases, in ``wandb/`` in the run's folder.
        wandb_project: project of the run in Weights & Biases.
        wandb_mode: ``offline`` writes files only, which ``wandb sync`` uploads later; ``online`` uploads
            during the run.
        mlflow: record the run with MLflow.
        mlflow_uri: where MLflow keeps the run: the address of a tracking server, or a database. Unless set,
            the database ``mlruns/mlflow.db`` in the run's folder. Passwords belong into the environment
            (``MLFLOW_TRACKING_PASSWORD``), since this key is in the run's ``config.toml``.
        mlflow_experiment: experiment of the run in MLflow.
        trackio: record the run with trackio, in the folder where trackio keeps all runs.
        trackio_project: project of the run in trackio.
        trackio_space: id of a Space of the Hugging Face hub, that shows the run. trackio makes it and uploads
            with your token of the hub.
    """

    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "fedsmoothlora"
    wandb_mode: Literal["online", "offline"] = "offline"
    mlflow: bool = False
    mlflow_uri: str | None = None
    mlflow_experiment: Annotated[str, MinLen(1)] = "fedsmoothlora"
    trackio: bool = False
    trackio_project: Annotated[str, MinLen(1)] = "fedsmoothlora"
    trackio_space: str | None = None


@dataclass(frozen=True, kw_only=True)
class FlowerSettings:
    """The keys of ``[flower]``; only federations through Flower read them.

    Attributes:
        clients: ids of the sites that hold their own data; each site sets its own ``data.source``. If empty,
            every process reads ``data.source`` and takes its client's rows, as on one machine.
        nodes: the fingerprint of each client's public key, by client id; ``flower init --keys`` writes it. A
            node then takes part as the client of its key only. Unless set, ids are not bound to keys.
        timeout: seconds that a round waits for replies; it continues with those that have arrived by then.
        wait: seconds that the coordinator waits for all sites to connect before training begins.
        warm: whether a process at each site keeps data and model between messages (on Linux). It ends with
            the federation, with the site's SuperNode, and after ``timeout`` seconds without a message.
    """

    clients: tuple[str, ...] = ()
    nodes: Mapping[str, str] | None = None
    timeout: Annotated[float, Gt(0)] = 3600.0
    wait: Annotated[float, Gt(0)] = 600.0
    warm: bool = True

    def check(self) -> None:
        """Raise ``ValueError`` for a client without a name or named twice, and for keys that bind no id."""
        for client in self.clients:
            if not client.strip() or self.clients.count(client) > 1:
                raise ValueError(
                    f"flower.clients: {client!r} must be a name of its own, and stand there once"
                )
        if self.nodes is None:
            return
        if unbound := [client for client in self.clients if client not in self.nodes]:
            raise ValueError(f"flower.nodes has no key of client {unbound[0]!r}; every client needs one")
        for client, key in self.nodes.items():
            if client not in self.clients:
                raise ValueError(f"flower.nodes.{client}: there is no such client in flower.clients")
            if not _FINGERPRINT.fullmatch(key):
                raise ValueError(
                    f"flower.nodes.{client} = {key!r} must be the fingerprint of a public key, such as "
                    "`ssh-keygen -lf` shows it: SHA256: and 43 characters"
                )
            if list(self.nodes.values()).count(key) > 1:
                raise ValueError(f"flower.nodes.{client} = {key!r} is the key of another client too")
