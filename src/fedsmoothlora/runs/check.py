"""Check a run before training: data, labels, layers, memory, bytes, time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.update import Coded
from fedsmoothlora.config import Config
from fedsmoothlora.data.examples import Batch
from fedsmoothlora.data.texts import UNLABELLED
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.federation import changes
from fedsmoothlora.federation.assembly import build_server, initial_state
from fedsmoothlora.federation.contributions import Contribution, summed
from fedsmoothlora.federation.messages import Reply
from fedsmoothlora.federation.server import Server, control_shapes
from fedsmoothlora.federation.settings import ServerSettings
from fedsmoothlora.federation.transport import Transport
from fedsmoothlora.logs import quiet_libraries
from fedsmoothlora.methods import Layer, Method, Sent
from fedsmoothlora.modeling.adapters import AdaptedModel
from fedsmoothlora.modeling.fingerprint import tokenizer_hash, weights_sha256
from fedsmoothlora.modeling.precision import stored_bytes
from fedsmoothlora.modeling.versions import computing_without_memory
from fedsmoothlora.printable import counted
from fedsmoothlora.reports.formats import distinct, printable, readable_bytes
from fedsmoothlora.reports.formats import seconds as readable_seconds
from fedsmoothlora.runs.console import by_pattern
from fedsmoothlora.runs.health import LARGE_SHARE, sets_calibration
from fedsmoothlora.runs.pace import Pace, measure_batch, seconds_of_round, seconds_of_run
from fedsmoothlora.runs.planning import Plan, build, measurement, plan
from fedsmoothlora.runs.privacy_lines import forecast
from fedsmoothlora.tasks.objectives import Objective
from fedsmoothlora.training.devices import described
from fedsmoothlora.training.loop import checkpointing
from fedsmoothlora.training.settings import TrainingSettings

_MOST_CLIENTS = 30
_LONGEST_NAME, _LONGEST_NAME_IN_A_SUMMARY = 16, 12
_FLOAT = 4
_ROUNDS_THAT_DIFFER = 2  # RoLoRA alternates


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Bytes that a run needs.

    Attributes:
        up: bytes of one client's upload; the largest if rounds differ.
        down: bytes of one message after the first rounds, to a client that takes part in all rounds; the
            largest if rounds differ.
        memory: the parts of the memory of training, by name.
    """

    up: int
    down: int
    memory: dict[str, int]


def check(
    config: Config,
    console: Console,
    *,
    site: str | None = None,
    data: str | None = None,
    measure: bool = False,
) -> None:
    """Plan a run and print its data, layers and costs; nothing is trained.

    With ``flower.clients``, a site checks its own data, and the coordinator checks everything but data.

    Args:
        config: the configuration.
        console: the console.
        site: one client's id, to check its data alone, and the values that must agree with the other sites.
        data: path of the site's data, instead of ``data.source``.
        measure: load the weights, measure a batch of a whole run for a few seconds, and forecast its time.

    Raises:
        ConfigError: a value or the data are not valid, or there is no such client.
        PackageError: a package that contains the model or the data cannot be fetched or read.
    """
    planned = _plan(config, site, data)
    measurement(planned)  # refuses rows that it cannot measure
    sites_have_data = site is None and bool(config.flower.clients)
    for note in planned.notes:
        console.print(f"note: {note}", style="yellow", highlight=False, soft_wrap=True)
    rows = f"{len(planned.train)} training rows, "
    rows += f"{len(planned.test)} test rows" if planned.test is not None else "no test set"
    if planned.classes != UNLABELLED:
        rows += f", {len(planned.classes)} classes"
    console.print(f"data: {config.data.source}, {rows}", highlight=False, soft_wrap=True)
    for fact in planned.task_data.facts():
        console.print(fact, highlight=False, soft_wrap=True)
    if sites_have_data:
        console.print(f"clients, with data of their own: {', '.join(config.flower.clients)}", highlight=False)
    else:
        console.print(_partition(planned, site, console.width))
        if site is None and (hidden := _hidden_clients(planned)):
            console.print(hidden, highlight=False)
    console.print(_layers(planned))
    if (names := planned.config.lora.target_modules) != config.lora.target_modules:
        line = f"lora.target_modules, as names of this model's layers: {', '.join(names)}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if planned.head_is_trained_whole:
        console.print(f"trained whole: {', '.join(planned.head)}", highlight=False)
    device = described(config.machine.device)
    console.print(f"device: {device}, machine.device = {config.machine.device!r}", highlight=False)
    costs = estimate(planned)
    for line in _cost_lines(planned, costs):
        console.print(line, highlight=False, soft_wrap=True)
    for line in forecast(config, planned.known_rows) if site is None else ():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if site is not None:
        for line in _in_common(planned):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if measure and site is None and not sites_have_data:
        for line in _time_lines(planned):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print("everything that can be checked before training is in order", style="green")


def _plan(config: Config, site: str | None, data: str | None) -> Plan:
    """The plan of a whole run, of one site's part, or of the coordinator's part."""
    known = config.flower.clients
    if data is not None:
        if site is None or not known:
            raise ConfigError("--data goes with --site, and with a configuration that names flower.clients")
        config = replace(config, data=replace(config.data, source=data))
    planned = None if known else plan(config)
    if planned is not None:
        known = tuple(planned.partition.clients)
    if site is not None and site not in known:
        raise ConfigError(f"--site {site}: there is no such client; there are {_some(list(known))}")
    if planned is not None:
        return planned
    if site is None:
        return plan(config, sites=known)
    # The test set is the coordinator's.
    return plan(replace(config, data=replace(config.data, test=None, test_rows=None)), site=site)


def _in_common(planned: Plan) -> Iterator[str]:
    """Values that must agree between a site and the coordinator; the weights are loaded for them."""
    model = build(planned).learner.model.model
    yield f"label map: {', '.join(map(printable, planned.outputs))}"
    yield f"tokenizer (SHA-256): {tokenizer_hash(planned.config.model)}"
    yield f"base weights (SHA-256): {weights_sha256(model)}"


def estimate(planned: Plan) -> Costs:
    """The costs of a run, computed from shapes: the model is built on the meta device.

    Raises ``ConfigError`` if the model cannot compute a training batch.
    """
    config = planned.config
    empty = planned.task_data.load(empty=True)
    weights = stored_bytes(empty.model, config.model, empty.head)
    model = AdaptedModel(
        empty.model, planned.lora, head=empty.head, head_is_trained_whole=planned.head_is_trained_whole
    )
    factors = sum(layer.rank * (layer.m + layer.n) for layer in model.layers.values()) * _FLOAT
    head = sum(value.nbytes for value in model.head().values())
    dense = sum(layer.m * layer.n for layer in model.layers.values()) * _FLOAT
    trains_weights = config.method.trains_weights
    trained = head + (dense if trains_weights else factors)
    moments = {"adamw": 2, "sgd": 0 if config.training.momentum == 0 else 1}[config.training.optimizer]
    up, down, merged = traffic(planned, model.layers, model.head())
    part = planned.task_data.widest_batch(planned.rows_at_once)
    untouched = config.model.untouched_by is not None
    clients = config.participation.count(len(planned.partition.clients))
    at_once = min(config.machine.jobs, clients)
    training = min(max(config.machine.jobs, config.machine.batch_clients), clients)  # one of both is 1
    memory = {
        "weights": weights,
        "pretrained copy of the adapted layers": 0 if untouched else dense,
        # Processes of clients share all weights except those that are rewritten for each client.
        f"adapted layers of {at_once} clients at once": dense * at_once
        if at_once > 1 and not untouched
        else 0,
        "sum of all updates, after the last round": merged,
        "trained parameters, with gradients and optimiser": trained * (2 + moments) * training,
        "calibration gradients": _calibration(planned, model.layers) * at_once if _calibrates(planned) else 0,
        "activations of a training batch": training
        * _activations(model.model, planned.task_data.objective(empty), part, config.training),
    }
    return Costs(up=up, down=down, memory=memory)


def traffic(planned: Plan, layers: Mapping[str, Layer], head: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """Bytes up and down of one client, and of the merged sum after all rounds.

    They are measured in two rounds of the real server with random uploads, the first two in which clients
    train. Layers of equal shape and rank cost the same, so one of each is enough.
    """
    method, transport = planned.config.method.widest, Transport(planned.config.transport.bits)
    first = next(round for round in count() if method.trains_in(round))
    last = first + _ROUNDS_THAT_DIFFER - 1
    training = TrainingSettings(rounds=last + 2)
    sections = replace(planned.config, method=method, server=ServerSettings(), training=training)
    alike = Counter((layer.m, layer.n, layer.rank) for layer in layers.values())
    shapes = {(layer.m, layer.n, layer.rank): layer for layer in layers.values()}
    ups, downs, merged = [0] * (last + 1), [0] * (last + 1), 0
    rounds = planned.config.training.rounds
    clients = planned.config.participation.merged(len(planned.partition.clients))
    for shape, layer in shapes.items():
        one = {layer.name: layer}
        # Numbers of bytes do not depend on the values of the initial LoRA and the pretrained weight.
        pretrained = {layer.name: torch.randn(layer.m, layer.n)}.__getitem__
        server = build_server(sections, initial_state(sections, one, pretrained), population=clients)
        for round in range(last + 1):
            if method.two_exchanges:
                up, down = _two_exchanges(server, layer)
                ups[round] += alike[shape] * up
                downs[round] += alike[shape] * down
                continue
            sent = [_made_up(method, round, layer, transport)]
            # Directions that clients have in common would be packed once, and lower a rank ``k``.
            if transport.packs or "k" in method.numbers_down:
                sent += [_made_up(method, round, layer, transport) for _ in range(clients - 1)]
            replies = [
                Reply(client=str(c), round=round, samples=1, sent=sent[c % len(sent)]) for c in range(clients)
            ]
            for reply in replies:
                server.delivered(reply.client)
            server.aggregate(replies)
            ups[round] += alike[shape] * replies[0].nbytes
            downs[round] += alike[shape] * server.message("0").nbytes
        update = server.updates[last].get(layer.name)
        if update is not None:  # factors, until they would hold more than the matrix
            factored = math.inf if isinstance(update, Tensor) else rounds * update.rank * (layer.m + layer.n)
            merged += alike[shape] * int(min(factored, layer.m * layer.n)) * _FLOAT
    size = changes.HEAD_NUMBERS.itemsize if transport.packs else _FLOAT
    shared = sum(value.numel() for value in head.values()) * size if method.traits.shares_head else 0
    up, down = max(ups[first:]) + shared, max(downs[first:]) + shared
    if planned.config.training.scaffold:  # control variates of all that is trained, both ways
        parameters = control_shapes(layers, method.sends(first), head)
        control = sum(math.prod(shape) for shape in parameters.values()) * _FLOAT
        up, down = up + control, down + control
    if method.exchanges_gradients:
        dense = sum(layer.m * layer.n for layer in layers.values()) * _FLOAT
        up, down = up + dense, down + dense
    return up, down, merged


def _two_exchanges(server: Server, layer: Layer) -> tuple[int, int]:
    """Bytes up and down of one client in a round of a shared subspace, without the head."""
    first = Reply(
        client="0",
        round=server.round,
        samples=1,
        sent={layer.name: torch.randn(layer.m, layer.rank)},
    )
    server.delivered("0")
    server.begin_second_exchange(summed([Contribution.of(first)]), 0)
    down = server.second_message("0").nbytes
    second = replace(first, exchange=1, sent={layer.name: torch.randn(layer.n, layer.rank)})
    server.aggregate([second])
    return first.nbytes + second.nbytes, down + server.message("0").nbytes


def _made_up(method: Method, round: int, layer: Layer, transport: Transport) -> Coded:
    """A random upload of one layer, as it is sent."""
    B, A = torch.randn(layer.m, layer.rank), torch.randn(layer.rank, layer.n)
    if transport.packs and (parts := changes.sent_parts(method, round)):
        moved = changes.factors({layer.name: LowRank(B, A)}, parts)
        return changes.code_changes(moved, {}, transport.bits)[0]
    parts_of: dict[Sent, LowRank | Tensor] = {
        "product": LowRank(B, A),
        "B": B,
        "A": A,
        "R": torch.randn(method.core_shape(layer)),
        "W": torch.randn(layer.m, layer.n),
    }
    sent = method.sends(round)
    return transport.coded({layer.name: parts_of[sent]} if sent in parts_of else {})


def _calibrates(planned: Plan) -> bool:
    return bool(planned.layers) and planned.config.method.calibration.batches > 0


def _calibration(planned: Plan, layers: Mapping[str, Layer]) -> int:
    """Bytes of all layers' calibration gradients, or of their sketches."""
    return int(sum(map(planned.config.method.calibration_numbers, layers.values())) * _FLOAT)


def _activations(model: nn.Module, objective: Objective, batch: Batch, settings: TrainingSettings) -> int:
    """Bytes that autograd keeps between forward and backward; a tensor kept twice counts twice.

    Raises ``ConfigError`` if the model cannot compute the batch, or cannot checkpoint as ``settings`` ask.
    """
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        # A weight is kept as a transposed view of itself, which takes no memory.
        if id(tensor) not in parameters and id(tensor._base) not in parameters:
            kept += tensor.nbytes
        return tensor

    model.train()
    with (
        computing_without_memory(model, batch) as shapes,
        checkpointing(model, settings),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        parameters = {id(parameter) for parameter in model.parameters()}
        try:
            objective.loss(model, shapes)
        except (ValueError, RuntimeError, TypeError) as error:  # of the model's own code
            raise ConfigError(f"the model cannot compute a training batch of these data: {error}") from error
    return kept


def _partition(planned: Plan, site: str | None, width: int) -> Table:
    table: dict[str, Any] = planned.partition_table()
    clients = list(table["clients"])[:_MOST_CLIENTS] if site is None else [site]
    steps = {
        client: planned.config.training.steps_for(
            len(planned.training_rows(client)), planned.config.method.calibration.batches
        )
        for client in clients
    }
    counts = {client: table["clients"][client] for client in clients}
    return partition_view(table["classes"], counts, steps, planned.ranks, width)


def partition_view(
    classes: Sequence[str],
    clients: Mapping[str, Sequence[int]],
    steps: Mapping[str, int],
    ranks: Mapping[str, int],
    width: int,
) -> Table:
    """A table of the clients' rows: by class where that fits into the width, else the most frequent class.

    Args:
        classes: names, in the order of the counts.
        clients: rows of each class, by client.
        steps: steps of local training in a round, by client.
        ranks: LoRA ranks by client where they differ; empty where they do not.
        width: of the terminal, in characters.
    """
    views = [
        _partition_table(clients, steps, ranks, columns(classes, list(clients.values())))
        for columns in (_counts_by_class, _most_frequent_class)
    ]
    unlimited = Console(width=10_000)
    fits = Measurement.get(unlimited, unlimited.options, views[0]).maximum <= width
    return views[0] if fits else views[1]


def _partition_table(
    clients: Mapping[str, Sequence[int]],
    steps: Mapping[str, int],
    ranks: Mapping[str, int],
    by_class: Mapping[str, Sequence[str]],
) -> Table:
    """A row for each client; ``by_class`` holds the cells of the last columns by title."""
    view = Table("client", box=None, title="partition", title_justify="left")
    for title in ("rows", "steps a round", *(["LoRA rank"] if ranks else []), *by_class):
        view.add_column(Text(title), justify="right")
    names = distinct(list(clients), _LONGEST_NAME)
    for place, (name, (client, counts)) in enumerate(zip(names, clients.items(), strict=True)):
        rank = [str(ranks[client])] if ranks else []
        cells = [str(sum(counts)), str(steps[client]), *rank, *(cells[place] for cells in by_class.values())]
        view.add_row(*map(Text, (name, *cells)))
    return view


def _hidden_clients(planned: Plan) -> str:
    """A line on the clients that the table leaves out; empty where it lists all."""
    hidden = [len(rows) for rows in list(planned.partition.clients.values())[_MOST_CLIENTS:]]
    if not hidden:
        return ""
    least, most = min(hidden), max(hidden)
    return f"... {len(hidden)} more clients with {least if least == most else f'{least} to {most}'} rows"


def _counts_by_class(classes: Sequence[str], clients: Sequence[Sequence[int]]) -> dict[str, list[str]]:
    """A column of counts for each class."""
    names = distinct(classes, _LONGEST_NAME)
    return {name: [str(counts[place]) for counts in clients] for place, name in enumerate(names)}


def _most_frequent_class(classes: Sequence[str], clients: Sequence[Sequence[int]]) -> dict[str, list[str]]:
    """A column of the number of classes that a client has rows of, and one of the most frequent class."""
    names = distinct(classes, _LONGEST_NAME_IN_A_SUMMARY)
    largest = [max(counts) for counts in clients]
    return {
        "classes": [str(sum(count > 0 for count in counts)) for counts in clients],
        "most frequent class": [
            f"{names[list(counts).index(most)]} ({most / max(1, sum(counts)):.0%})"
            for counts, most in zip(clients, largest, strict=True)
        ],
    }


def _layers(planned: Plan) -> Table:
    titles = ("layer", "shape", "rank", "scale", "how many")
    view = Table(*titles, box=None, title="adapted layers", title_justify="left")
    for name, alike in by_pattern(planned.layers).items():
        layer = alike[0]
        shape = f"{layer.m} x {layer.n}"
        view.add_row(name, shape, str(layer.rank), f"{layer.scale:g}", str(len(alike)))
    if not planned.layers:
        view.add_row("none")
    return view


def _cost_lines(planned: Plan, costs: Costs) -> Iterator[str]:
    clients = planned.config.participation.merged(len(planned.partition.clients))
    yield (
        f"a round: {clients} clients; up {readable_bytes(costs.up)} and down {readable_bytes(costs.down)} a "
        f"client, {readable_bytes(clients * (costs.up + costs.down))} in all"
    )
    yield from _asynchronous_lines(planned)
    total = sum(costs.memory.values())
    yield from _rank_lines(planned)
    yield f"memory: about {readable_bytes(total)}, beside what Python and torch need"
    for name, size in costs.memory.items():
        if size:
            yield f"  {name}: {readable_bytes(size)}"


def _asynchronous_lines(planned: Plan) -> Iterator[str]:
    """A sentence on the keys of asynchronous rounds."""
    participation, clients = planned.config.participation, len(planned.partition.clients)
    if not participation.asynchronous:
        return
    most = participation.max_staleness
    weight = "1/sqrt(1 + k)" if participation.staleness_weight == "inverse_sqrt" else "1"
    yield (
        f"asynchronous: {participation.count(clients)} of {clients} clients train at the same time, and a "
        f"round ends as soon as {participation.buffer} uploads are there; an upload that began k rounds ago "
        f"counts with weight {weight}" + ("" if most is None else f", and is dropped if k > {most}")
    )


def _time_lines(planned: Plan) -> Iterator[str]:
    """The forecast of a run's time, from a measured batch."""
    if getattr(planned.config.task, "frozen_features", None) is not None:
        yield "time: not measured, because a run first evaluates its frozen features, and keeps them"
        return
    with quiet_libraries():
        measured = measure_batch(planned)
    a_round, rounds = seconds_of_round(planned, measured.pace), planned.config.training.rounds
    config = planned.config
    yield (
        f"time: about {readable_seconds(a_round)} a round and "
        f"{readable_seconds(seconds_of_run(planned, measured.pace))} in all {counted(rounds, 'round')}"
    )
    yield (
        f"  measured: {readable_seconds(measured.seconds)} forward and backward of "
        f"{counted(measured.rows, 'row')}, on this machine as busy as now"
    )
    if config.machine.batch_clients > 1:
        together = config.machine.batch_clients
        yield f"  for one client after the other; machine.batch_clients = {together} takes less"
    if measured.pace.start and (share := _share_of_starts(planned, measured.pace)) >= LARGE_SHARE:
        batches = config.method.calibration.batches
        key = f": method.calibration_batches = {batches}" if sets_calibration(config.method) else ""
        yield f"  calibration: {share:.0%} of the clients' time{key}"


def _share_of_starts(planned: Plan, pace: Pace) -> float:
    """The share of a round's training that the clients' starts take."""
    rounds = seconds_of_round(planned, replace(pace, evaluated_row=0.0))
    return 1 - seconds_of_round(planned, replace(pace, evaluated_row=0.0, start=0.0)) / rounds


# Bytes that differ by less count as equal.
_EQUAL = 1.03


def _rank_lines(planned: Plan) -> Iterator[str]:
    """The preset, the rank that FedIT's bytes buy, and the calibration rows that the rank wants."""
    config, method = planned.config, planned.config.method
    preset = method.options().get("preset")
    if isinstance(preset, str):
        names = method.option_names()
        chosen = {
            dotted: getattr(method, names[key]) if section == "method" else config.transport.bits
            for dotted in method.presets[preset]
            for section, _, key in [dotted.partition(".")]
        }
        yield f"preset {preset}: {', '.join(f'{key} = {_toml(value)}' for key, value in chosen.items())}"
    if config.transport.bits < 16 and planned.layers:
        yield (
            f"rank: FedIT in bfloat16 at rank {config.lora.r} sends as many bytes as rank "
            f"{affordable_rank(planned.layers, config.lora.r, config.transport.bits)} in "
            f"{config.transport.bits} bits"
        )
    if _calibrates(planned):
        calibration = method.calibration
        size = calibration.batch_size or config.training.batch_size
        wanted = 2 * max(layer.rank for layer in planned.layers.values())
        rows = calibration.batches * size
        yield (
            f"aligned start: rank {wanted // 2} needs {wanted} directions of the calibration gradient, and "
            f"{rows} rows (method.calibration_batches = {calibration.batches} of {size} rows) give at most "
            f"{rows} in a layer that sees one vector per row"
            + ("" if rows >= wanted else f": take {wanted} rows or more")
        )


def affordable_rank(layers: Mapping[str, Layer], rank: int, bits: int) -> int:
    """The rank whose packed products are as many bytes as FedIT's factors of rank ``rank`` in bfloat16.

    Within 3 %; layers of other ranks are scaled alike.
    """
    fedit = sum(2 * layer.rank * (layer.m + layer.n) for layer in layers.values())
    packed = sum(layer.rank * ((layer.m + layer.n) * bits / 8 + _FLOAT) for layer in layers.values())
    return int(_EQUAL * fedit / packed * rank)


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
