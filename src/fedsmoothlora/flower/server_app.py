"""The ServerApp: one run whose clients are Flower's nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console
from torch import Tensor, nn

from fedsmoothlora.config import Config, ConfigError, read
from fedsmoothlora.federation.assembly import Participants, RunContext
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.flower.coordinator import FlowerEngine
from fedsmoothlora.flower.handshake import SiteInfo
from fedsmoothlora.modeling.fingerprint import tokenizer_hash, weights_sha256
from fedsmoothlora.runs.folders import check_clients
from fedsmoothlora.runs.planning import Plan, build, load, measurement, plan
from fedsmoothlora.runs.session import carry_out, run_spec


class RowsAtSite:
    """The rows of a client on another machine, of which the coordinator knows the number only."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Not available. Raises ``RuntimeError``: rows do not leave their site."""
        raise RuntimeError("rows do not leave their site")


def server_app(config: Path) -> ServerApp:
    """The ServerApp of a federation. ``out`` and ``resume`` of its run-config are folders of runs.

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
        grid: Flower's connection to the nodes.
        config: the configuration.
        out: the run's folder; ``runs/NAME-TIME`` unless given.
        resume: the folder of a run to resume, in place of ``out``.

    Raises:
        ConfigError: the configuration is wrong, or cannot be run by sites.
        DisagreementError: sites and coordinator do not agree.
        FederationStoppedError, InterruptedRunError: as `fedsmoothlora.runs.session.run`.
    """
    check_for_sites(config)
    if resume is not None:
        check_clients(config, Path(resume))  # before it waits for sites
    torch.set_num_threads(config.machine.threads)
    planned = plan(config, sites=config.flower.clients)
    loaded = load(planned)
    own = _own_info(loaded.adapted.model, planned)
    engine = FlowerEngine(
        grid,
        config.flower,
        own,
        list(planned.partition.clients),
        units_per_row=config.task.units_per_row,
    )
    console = Console()

    def make(context: RunContext) -> Simulation:
        return build(
            planned, context, loaded=loaded, participants=_participants(planned, site_infos), engine=engine
        )

    try:
        site_infos = engine.handshake(lambda text: console.print(text, highlight=False, markup=False))
        carry_out(
            run_spec(planned, partition=_partition(planned, site_infos)),
            make,
            out=resume or out,
            resume=resume is not None,
            console=console,
        )
    except Exception:  # but not if this process is asked to exit
        engine.end()
        raise
    engine.end()


def _participants(planned: Plan, site_infos: Mapping[str, SiteInfo]) -> Participants:
    """The sites as clients, of whose rows the coordinator knows the number, and the global test set."""
    clients = planned.partition.clients
    # The test set is here; clients' own models are at the sites.
    has_test = planned.config.method.traits.global_model and planned.test is not None
    return Participants(
        clients={client: RowsAtSite(site_infos[client].samples) for client in clients},
        validation={
            client: RowsAtSite(site_infos[client].validation)
            for client in clients
            if site_infos[client].validation
        },
        test=planned.task_data.test if has_test else None,
        measurement=measurement(planned),
        ranks=planned.ranks,
    )


def check_for_sites(config: Config) -> None:
    """Raise ``ConfigError`` if the configuration cannot be run with clients on other machines."""
    if config.machine.jobs > 1:
        raise ConfigError(
            f"{config.name}: machine.jobs = {config.machine.jobs}: with Flower every site is a process "
            "of its own, and all of them train at once; leave it at 1"
        )
    if config.machine.compile and not config.flower.warm:
        raise ConfigError(
            f"{config.name}: machine.compile = true and flower.warm = false: every message to a site would "
            "start a new process, which would compile the model again: leave one of them out"
        )
    if config.machine.batch_clients > 1:
        raise ConfigError(
            f"{config.name}: machine.batch_clients = {config.machine.batch_clients}: with Flower every site "
            "trains its own client only; leave it at 1"
        )
    if config.method.exchanges_gradients:
        raise ConfigError(
            f"{config.name}: method {config.method.name!r} with these options sends calibration gradients to "
            "other clients, and they do not leave sites (docs/privacy.md); with Flower, take other options, "
            "such as method.gradient_aligned = 'client', or another method"
        )
    _check_asynchronous(config)
    if not config.method.traits.global_model and config.privacy.uploads_only:
        raise ConfigError(
            f"{config.name}: method {config.method.name!r} has no global model, so its metrics are the "
            f"clients' on validation rows, and with {config.privacy.key} they do not leave the sites; choose "
            "a method with a global model"
        )
    if not config.method.traits.global_model and not config.data.validation:
        raise ConfigError(
            f"{config.name}: method {config.method.name!r} has no global model, so its metrics are the "
            "clients' on validation rows: set data.validation, for instance to 0.1"
        )


def _check_asynchronous(config: Config) -> None:
    """Raise ``ConfigError`` for keys that sites in asynchronous rounds cannot follow."""
    participation = config.participation
    for key, reason in (
        ("speeds", "sites are as fast as they are, and speeds are for simulations"),
        ("replay", "sites finish when they finish; repeat a recorded order with `fedsmoothlora run`"),
    ):
        if (value := getattr(participation, key)) is not None:
            raise ConfigError(f"{config.name}: participation.{key} = {value!r}: {reason}; leave it out")
    if participation.asynchronous and config.data.validation and config.method.traits.global_model:
        raise ConfigError(
            f"{config.name}: data.validation = {config.data.validation:g} with participation.buffer = "
            f"{participation.buffer}: after each round the coordinator would wait for the sites that still "
            "train, to evaluate the global model there; leave it out, and give a test set (data.test)"
        )


def _own_info(model: nn.Module, planned: Plan) -> SiteInfo:
    return SiteInfo(
        client="coordinator",
        samples=0,
        validation=0,
        classes=planned.outputs,
        weights=weights_sha256(model),
        tokenizer=tokenizer_hash(planned.config.model),
    )


def _partition(planned: Plan, site_infos: Mapping[str, SiteInfo]) -> dict[str, object]:
    """The content of ``partition.json``: all clients' number, and the label histograms that sites show."""
    shown = {client: list(one.histogram) for client, one in site_infos.items() if one.histogram}
    outputs = {} if planned.outputs == planned.classes else {"outputs": list(planned.outputs)}
    return {
        "classes": list(planned.classes),
        **outputs,
        "clients": shown,
        "left_out": 0,
        "client_count": len(site_infos),
    }
