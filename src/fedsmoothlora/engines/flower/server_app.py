"""The ServerApp: a whole run whose clients are Flower's nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console
from torch import Tensor

from fedsmoothlora.config import Config, ConfigError, read
from fedsmoothlora.engines.flower.agreement import Facts, tokenizer_hash
from fedsmoothlora.engines.flower.coordinator import FlowerEngine
from fedsmoothlora.fingerprint import weights_sha256
from fedsmoothlora.planning import Plan, build, plan
from fedsmoothlora.rounds import Simulation
from fedsmoothlora.running import carry_out


class RowsAtSite:
    """A client's rows as the coordinator knows them: how many there are."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Raises ``RuntimeError``: rows do not leave their site."""
        raise RuntimeError("rows do not leave their site")


def server_app(config: Path) -> ServerApp:
    """The ServerApp of a federation; its run-config has ``out`` and ``resume``, folders of runs.

    Args:
        config: its ``config.toml``.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        out, resume = (str(context.run_config.get(key) or "") or None for key in ("out", "resume"))
        coordinate(grid, read(config), out=out, resume=resume)

    return app


def coordinate(grid: Grid, config: Config, *, out: str | None, resume: str | None) -> None:
    """Run a federation whose clients are nodes.

    Args:
        grid: the way to them.
        config: the configuration.
        out: the run's folder; ``runs/NAME-TIME`` unless given.
        resume: the folder of a run to go on with, in place of ``out``.

    Raises:
        ConfigError: something cannot be right, or cannot be done with sites.
        DisagreementError: sites and coordinator do not agree.
        FederationStoppedError, InterruptedRunError: as `fedsmoothlora.running.run`.
    """
    check_for_sites(config)
    torch.set_num_threads(config.machine.threads)
    planned = plan(config, sites=config.flower.clients)
    simulation = build(planned)
    engine = FlowerEngine(grid, config.flower, _own_facts(simulation, planned), list(simulation.clients))
    console = Console()
    facts = engine.agree(lambda text: console.print(text, highlight=False, markup=False))

    def make() -> Simulation:
        simulation.engine = engine
        simulation.clients = {client: RowsAtSite(facts[client].samples) for client in simulation.clients}
        simulation.validation = {
            client: RowsAtSite(facts[client].validation)
            for client in simulation.clients
            if facts[client].validation
        }
        if not config.method.traits.global_model:
            simulation.test = None  # clients' own models are at the sites, the test set is not
        return simulation

    carry_out(planned, make, out=out, resume=resume, console=console, partition=_partition(planned, facts))


def check_for_sites(config: Config) -> None:
    """Raise ``ConfigError`` for what must not or cannot be done where clients are on other machines."""
    if config.machine.jobs > 1:
        raise ConfigError(
            f"{config.name}: machine.jobs = {config.machine.jobs}: with Flower every site is a process "
            "of its own, and all of them train at once; leave it at 1"
        )
    source = getattr(config.method.options, "gradient_aligned", None)
    if source in ("shared", "shuffled"):
        raise ConfigError(
            f"{config.name}: method.gradient_aligned = {source!r} sends gradients of calibration, which do "
            "not leave sites (docs/privacy.md): with Flower, take 'client'"
        )
    if not config.method.traits.global_model and not config.data.validation:
        raise ConfigError(
            f"{config.name}: method {config.method.name!r} has no global model, so its figures are the "
            "clients' on validation rows: set data.validation, for instance to 0.1"
        )


def _own_facts(simulation: Simulation, planned: Plan) -> Facts:
    return Facts(
        client="coordinator",
        samples=0,
        validation=0,
        classes=planned.classes,
        weights=weights_sha256(simulation.learner.model.model),
        tokenizer=tokenizer_hash(planned.config.model),
    )


def _partition(planned: Plan, facts: Mapping[str, Facts]) -> dict[str, object]:
    """``partition.json`` with the label histograms of those sites that show them."""
    shown = {client: list(one.histogram) for client, one in facts.items() if one.histogram}
    return {"classes": list(planned.classes), "clients": shown, "left_out": 0}
