"""A whole run: from a configuration to a folder with its metrics, pictures and model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedsmoothlora.config import Config, ConfigError, read
from fedsmoothlora.environment import environment
from fedsmoothlora.export import save_merged
from fedsmoothlora.federation import build, plan
from fedsmoothlora.pictures import draw_curves
from fedsmoothlora.progress import ConsoleWatcher
from fedsmoothlora.rounds import RoundRecord, run_rounds
from fedsmoothlora.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to.

    Attributes:
        folder: the run's folder.
        records: a record before the first round and after every round.
    """

    folder: Path
    records: list[RoundRecord]

    @property
    def accuracy(self) -> float | None:
        """Accuracy of the final global model on the test set, where it was measured."""
        return self.records[-1].value("accuracy")


def run(
    config: str | Path | Mapping[str, Any] | Config,
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    console: Console | None = None,
) -> Result:
    """Run a federation in this process.

    Args:
        config: a TOML file, a recipe's name, a table, or a configuration that was read before.
        overrides: values to put in place of the configuration's own, by dotted key:
            ``{"training.rounds": 3}``.
        out: the run's folder, new or empty; ``runs/NAME-TIME`` unless given.
        console: where progress is shown; standard output unless given.

    Returns:
        The folder and every round's record.

    Raises:
        ConfigError: a value cannot be right, or ``out`` is in use. Nothing was trained.
        PackageError: a package that ships the model or the data cannot be had.
        FederationStoppedError: every client of a round diverged.
    """
    if not isinstance(config, Config):
        config = read(config, overrides)
    elif overrides:
        raise ConfigError(
            "overrides go with a file, a recipe or a table, not with a configuration read before"
        )
    console = console or Console()
    _quiet_libraries()
    torch.set_num_threads(config.machine.threads)

    planned = plan(config)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        folder = RunFolder.create(Path(out or Path("runs") / f"{config.name}-{stamp}"))
    except FileExistsError as error:
        raise ConfigError(str(error)) from None
    federation = build(planned)
    server = federation.server
    folder.write_config(config.to_toml())
    folder.write_environment(environment(str(federation.learner.accelerator.device)))
    folder.write_head(server.head)

    records: list[RoundRecord] = []
    with ConsoleWatcher(console) as watcher:
        console.print(
            f"{config.name}: {config.method.name}, {len(federation.clients)} clients, "
            f"{server.rounds} rounds, {len(server.layers)} adapted layers; in {folder.path}",
            highlight=False,
        )
        watcher.layers(server.layers, planned.head, planned.head_is_trained_whole)
        for record in run_rounds(federation, watcher):
            if record.round > 0:
                folder.write_update(record.round, server.updates[-1])
            folder.append_metrics(record)
            records.append(record)
            watcher.record(record, server.rounds)
    pictures = draw_curves(folder.metrics(), folder.path)
    save_merged(federation, planned, folder.path / "model")
    console.print(
        f"pictures: {', '.join(str(picture) for picture in pictures)}\nmodel:    {folder.path / 'model'}",
        highlight=False,
        soft_wrap=True,
    )
    return Result(folder=folder.path, records=records)


def _quiet_libraries() -> None:
    """Keep transformers' reports on missing heads, which are expected here, out of the user's face."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
