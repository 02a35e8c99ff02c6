"""Packed transport in whole federations: bytes, what both sides hold, resumption, and refused replies."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from families import by_family
from fedsmoothlora import methods
from fedsmoothlora.algebra.coding import Packed, coded_product, unpacked
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError, InterruptedRunError, LostStateError, WireError
from fedsmoothlora.federation import changes
from fedsmoothlora.federation.catch_up import catch_up
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.payload import Payload
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.settings import UploadSettings
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.federation.uploads import ReplySpec, check_replies
from fedsmoothlora.federation.wire import pack, unpack
from fedsmoothlora.methods import Layer
from fedsmoothlora.runs import session
from fedsmoothlora.runs.check import affordable_rank, check, estimate
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.session import run
from layer_names import QUERY

Federation = Callable[..., Simulation]
LOW_BIT = {"method.zeta": 0.0, "method.server_feedback": True, "transport.bits": 4}
PACKED = [
    name
    for name in methods.names()
    if not (methods.find(name).traits.float32_reason or methods.find(name).traits.packed_reason)
    and methods.find(name)().sends(0) != "W"
]
KEEP_A_LORA = [name for name in PACKED if methods.find(name).traits.averages_factors]


def options(name: str, bits: int = 4) -> dict[str, Any]:
    own = {**LOW_BIT, "method.client_feedback": True} if name == "fedsmoothlora" else {"method.name": name}
    return {**own, "transport.bits": bits}


def totals(simulation: Simulation, callback: Callback | None = None) -> list[dict[str, float]]:
    """Metrics of the server and the global model in every round."""
    return [
        {metric.name: metric.value for metric in record.metrics if metric.client is None}
        for record in run_rounds(simulation, callback or Callback())
    ]


@pytest.mark.parametrize("name", by_family(PACKED))
@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.release), 3])
def test_check_counts_the_packed_bytes_that_a_run_sends(
    name: str, bits: int, toy_federation: Federation, toy_table: dict[str, Any]
) -> None:
    found = totals(toy_federation(options(name, bits)))
    costs = estimate(plan(read(toy_table, options(name, bits))))
    assert max(one["bytes_up"] for one in found[1:]) == 3 * costs.up
    down = max(one["bytes_down"] for one in found[2:])
    # What fedmomentum merges has fewer directions where the integers of the uploads are linearly dependent.
    # florist leaves out small ones.
    assert down <= 3 * costs.down if name in ("fedmomentum", "florist") else down == 3 * costs.down
    assert not any(one["refused"] for one in found[1:])


def test_a_layers_bytes_are_those_of_the_formula(toy_federation: Federation) -> None:
    simulation = toy_federation({**LOW_BIT, "model.head": "lora", "lora.head_r": 1})
    found = totals(simulation)
    layers = simulation.server.layers.values()
    most = sum(layer.rank * (layer.m + layer.n) * 4 / 8 + 4 * layer.rank for layer in layers)
    assert 0.9 * most < found[-1]["bytes_up"] / 3 <= most
    assert found[-1]["bytes_down"] <= 3 * most


@pytest.mark.parametrize("name", by_family(KEEP_A_LORA))
def test_clients_hold_the_servers_lora_and_head_to_the_bit(name: str, toy_federation: Federation) -> None:
    """With clients that miss rounds, which are sent several changes."""
    simulation = toy_federation({**options(name), "participation.clients": 2, "training.rounds": 4})
    server, learner = simulation.server, simulation.learner
    parts = changes.shared_parts(server.method)
    real, seen = learner.changes.held, []

    def held(view: Any, message: Message) -> Any:
        found = real(view, message)
        initial = {layer: server.initial_state.initial(layer) for layer in server.layers}
        right = changes.factors(server.model or server.lora or initial, parts)
        assert {key for key in found if not key.startswith(changes.HEAD)} == right.keys()
        assert all(torch.equal(found[key], value) for key, value in right.items())
        if server.method.traits.shares_head:
            for key, value in server.head.items():
                assert torch.equal(changes.head_of(found)[key], value)
        seen.append(len({key.partition(":")[0] for key in message.changes}))
        return found

    object.__setattr__(learner.changes, "held", held)
    totals(simulation)
    assert {0, 1} < set(seen) | {2}
    assert max(seen) >= 1


@pytest.mark.parametrize("name", ["fedsmoothlora", "flexlora"])
def test_the_server_continues_from_what_clients_decode(name: str, toy_federation: Federation) -> None:
    simulation = toy_federation({**options(name), "participation.clients": 2, "training.rounds": 4})
    server = simulation.server
    for _ in run_rounds(simulation, Callback()):
        if not server.round:
            continue
        message = server.message("0")
        for layer in server.layers:
            if name == "flexlora":
                came = unpacked(message.lora[layer])
                assert isinstance(came, LowRank)
                assert torch.equal(came.B, server.model[layer].B)
                assert torch.equal(came.A, server.model[layer].A)
            else:
                assert isinstance(server.updates[server.round - 1][layer], Packed)
                sums = [unpacked(server.updates[t][layer]) for t in range(message.first_update, server.round)]
                came = unpacked(message.updates[layer]) if message.updates else LowRank.zeros(1, 1)
                if message.updates:
                    right = LowRank.weighted_sum(sums, [1.0] * len(sums))  # type: ignore[arg-type]
                    assert torch.equal(LowRank.of(came).dense(), right.dense())


def test_many_missed_updates_are_sent_dense_where_that_is_smaller() -> None:
    layers = {"w": Layer("w", 6, 5, 2, scale=1.0, gradient_rank=5)}
    updates = [{"w": coded_product(drawn(seed), 4)} for seed in range(12)]
    total = sum(LowRank.of(unpacked(update["w"])).dense() for update in updates)
    few, many = catch_up(updates[:2], layers)["w"], catch_up(updates, layers)["w"]
    assert isinstance(few, Packed)
    assert isinstance(many, torch.Tensor)
    assert many.nbytes <= 4 * 6 * 5
    assert torch.allclose(many, total, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedsmoothlora", "fedit", "rolora"])
def test_a_resumed_packed_run_is_the_same_to_the_bit(
    name: str, toy_table: dict[str, Any], tmp_path: Path
) -> None:
    config = read(toy_table, {**options(name), "participation.clients": 2, "training.rounds": 4})
    quiet = Console(quiet=True)
    whole = run(config, out=tmp_path / "whole", console=quiet).folder
    real, stopped = session.Checkpoints.save, []

    def save(self: Any, server: Any, *rest: Any) -> None:
        real(self, server, *rest)
        if server.round == 2 and not stopped:
            stopped.append(True)
            raise InterruptedRunError("stopped by the test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Checkpoints, "save", save)
        with pytest.raises(InterruptedRunError):
            run(config, out=tmp_path / "parted", console=quiet)
    parted = run(config, resume=tmp_path / "parted", console=quiet).folder
    for path in sorted([*(whole / "updates").iterdir(), whole / "model" / "model.safetensors"]):
        right, got = load_file(path), load_file(parted / path.relative_to(whole))
        assert right.keys() == got.keys()
        assert all(torch.equal(value, got[key]) for key, value in right.items())
    assert (whole / "metrics.jsonl").read_text().count("bytes_down") == (
        parted / "metrics.jsonl"
    ).read_text().count("bytes_down")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedsmoothlora", "fedit"])
def test_several_processes_give_the_same_bits(name: str, toy_table: dict[str, Any], tmp_path: Path) -> None:
    overrides = {**options(name), "training.rounds": 3, "participation.clients": 2}
    one, other = (
        run(
            read(toy_table, {**overrides, "machine.jobs": jobs}),
            out=tmp_path / str(jobs),
            console=Console(quiet=True),
        ).folder
        for jobs in (1, 2)
    )
    right, got = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(value, got[key]) for key, value in right.items())


def test_a_client_that_lost_its_state_sits_out_once_and_is_sent_the_whole_lora(
    toy_federation: Federation,
) -> None:
    simulation = toy_federation({**options("fedit"), "training.rounds": 4})
    notes: list[str] = []

    class Notes(Callback):
        def on_note(self, text: str) -> None:
            notes.append(text)

    found = []
    for record in run_rounds(simulation, Notes()):
        found.append(record.value("clients"))
        if record.round == 1:
            simulation.states.save("0", ClientState())
    assert found == [None, 3, 2, 3, 3]
    assert [note for note in notes if "client 0 sits out round 2" in note and "is gone" in note]
    assert not simulation.server.changes.behind


def test_a_message_of_changes_without_what_they_belong_to_is_a_lost_state(toy_federation: Federation) -> None:
    simulation = toy_federation(options("fedit"))
    message = Message(round=1, accepted_round=0, changes={"0:head:x": torch.zeros(1, dtype=torch.bfloat16)})
    with pytest.raises(LostStateError, match="is gone"):
        simulation.learner.visit("0", simulation.clients["0"], message, ClientState(), Callback())


# -- refused


@pytest.mark.parametrize("name", [n for n in methods.names() if n not in PACKED])
def test_methods_that_cannot_be_packed_say_why(name: str, toy_table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"transport.bits = 4 does not work with method '{name}'"):
        read(toy_table, {"method.name": name, "transport.bits": 4})


def test_exchanged_gradients_and_other_numbers_of_bits_are_refused(toy_table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="whole gradients"):
        read(toy_table, {"method.gradient_aligned": "shared", "transport.bits": 4})
    with pytest.raises(ConfigError, match=r"transport\.bits = 5"):
        read(toy_table, {"transport.bits": 5})
    with pytest.raises(
        ConfigError, match=r"transport\.dtype is now called transport\.bits.*'bfloat16' is now 16"
    ):
        read(toy_table, {"transport.dtype": "bfloat16"})


def drawn(seed: int, m: int = 6, n: int = 5, rank: int = 2) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(m, rank, generator=draw), torch.randn(rank, n, generator=draw))


SPEC = ReplySpec(
    experiment="x",
    round=0,
    attempt=0,
    clients={"a": 3, "b": 3, "c": 3},
    products={"w": Layer("w", 6, 5, 2, scale=1.0, gradient_rank=5)},
    factors={"v.lora_B": (4, 2), "v.lora_A": (2, 3)},
    head={"bias": torch.ones(3)},
    bits=3,
)


def reply(client: str, **sent: Any) -> Reply:
    coded, _ = changes.code_changes(
        {"v.lora_B": torch.randn(4, 2), "v.lora_A": torch.randn(2, 3), "head:bias": torch.randn(3)}, {}, 3
    )
    good = {"w": coded_product(drawn(0), 3), "v.lora_B": coded["v.lora_B"], "v.lora_A": coded["v.lora_A"]}
    return Reply(
        client=client,
        experiment="x",
        round=0,
        samples=3,
        sent={**good, **sent},
        head=changes.head_of(coded),
    )


GOOD = coded_product(drawn(0), 3)
FACTOR = reply("a").sent["v.lora_B"]


def damaged(value: Any = GOOD, **fields: Any) -> Any:
    return replace(value, **fields)


@pytest.mark.parametrize(
    ("layer", "value"),
    [
        ("w", drawn(0)),
        ("w", drawn(0).B),
        ("w", coded_product(drawn(0), 4)),
        ("w", coded_product(drawn(0, rank=3), 3)),
        ("w", coded_product(drawn(0, m=7), 3)),
        ("w", damaged(shape=(5, 6))),
        ("w", damaged(part="A")),
        ("w", damaged(scales=GOOD.scales.double())),
        ("w", damaged(scales=GOOD.scales[:1])),
        ("w", damaged(scales=GOOD.scales[None])),
        ("w", damaged(scales=torch.tensor([float("nan"), 1.0]))),
        ("w", damaged(scales=torch.tensor([float("inf"), 1.0]))),
        ("w", damaged(scales=torch.tensor([-1.0, 1.0]))),
        ("w", damaged(scales=torch.tensor([1e30, 1.0]))),
        ("w", damaged(scales=torch.empty(2, device="meta"))),
        ("w", damaged(codes=GOOD.codes.to(torch.int8))),
        ("w", damaged(codes=GOOD.codes[:-1])),
        ("w", damaged(codes=GOOD.codes.repeat(2))),
        ("w", damaged(codes=torch.full_like(GOOD.codes, 255))),
        ("w", damaged(codes=torch.cat([GOOD.codes[:-1], torch.tensor([128], dtype=torch.uint8)]))),
        ("w", damaged(codes=GOOD.codes.to_sparse())),
        ("w", damaged(codes=None)),
        ("w", damaged(bits="3")),
        ("v.lora_B", GOOD),
        ("v.lora_B", torch.randn(4, 2)),
        ("v.lora_B", damaged(FACTOR, scales=FACTOR.scales.float())),
        ("v.lora_B", damaged(FACTOR, scales=FACTOR.scales[:1], codes=FACTOR.codes[:2])),
        ("v.lora_A", FACTOR),
    ],
)
def test_malformed_packed_uploads_are_refused_and_the_others_count(layer: str, value: Any) -> None:
    bad = reply("a", **{layer: value})
    checked = check_replies([bad, reply("b"), reply("c")], SPEC, UploadSettings())
    assert [one.client for one in checked.accepted] == ["b", "c"]
    ((_, why),) = checked.refused
    assert layer in why


def test_a_head_that_is_no_change_in_bfloat16_is_refused() -> None:
    good = reply("a")
    bad = replace(good, head={"bias": torch.ones(3)})
    checked = check_replies([bad, reply("b")], SPEC, UploadSettings())
    assert "bfloat16" in checked.refused[0][1]
    assert len(checked.accepted) == 1


def test_packed_uploads_are_clipped_to_the_median() -> None:
    large = reply("c", w=coded_product(drawn(0) * 5, 3))
    settings = UploadSettings(clip_to_median=True)
    checked = check_replies([reply("a"), reply("b"), large], SPEC, settings)
    clipped = checked.accepted[2].sent["w"]
    assert isinstance(clipped, Packed)
    assert float(LowRank.of(unpacked(clipped)).norm()) < 2 * float(drawn(0).norm())


# -- the wire


def test_packed_replies_cross_the_wire_unchanged_with_little_framing() -> None:
    """One block of Llama-3.2-1B, whose 16 blocks are alike."""
    shapes = {"q": (2048, 2048), "k": (512, 2048), "v": (512, 2048), "o": (2048, 2048)}
    shapes |= {"gate": (8192, 2048), "up": (8192, 2048), "down": (2048, 8192)}
    sent = {
        f"model.layers.{block}.{name}_proj": coded_product(drawn(block, m, n, 8), 4)
        for block, (name, (m, n)) in enumerate(shapes.items())
    }
    right = Reply(client="a", round=0, samples=1, sent=sent)
    payload = pack(right)
    assert right.nbytes == sum(8 * (m + n) * 4 // 8 + 4 * 8 for m, n in shapes.values())
    assert len(payload.tensors) <= 1.01 * right.nbytes
    came = unpack(Reply, payload)
    for name, value in sent.items():
        got = came.sent[name]
        assert isinstance(got, Packed)
        assert torch.equal(got.codes, value.codes)
        assert torch.equal(got.scales, value.scales)
        assert (got.shape, got.bits, got.part) == (value.shape, value.bits, value.part)


@pytest.mark.parametrize(
    "damage",
    [
        {"w/form": torch.tensor([0, 6, 5], dtype=torch.int32)},
        {"w/form": torch.tensor([0.0, 6, 5, 3])},
        {"w/form": torch.tensor([9, 6, 5, 3], dtype=torch.int32)},
        {"w/form": torch.tensor([0, -6, 5, 3], dtype=torch.int32)},
        {"w/form": torch.tensor([0, 6, 5, 300], dtype=torch.int32)},
        {"w/scales": torch.ones(2, 1)},
        {"w/codes": torch.zeros(9, 1, dtype=torch.uint8)},
        {"w/scales": None},
    ],
)
def test_a_malformed_packed_tensor_is_no_reply(damage: dict[str, Any]) -> None:
    from fedsmoothlora.federation.serialization import serialised
    from fedsmoothlora.federation.wire import _deflated

    tensors = {"w/codes": GOOD.codes, "w/scales": GOOD.scales}
    tensors |= {"w/form": torch.tensor([0, 6, 5, 3], dtype=torch.int32)} | damage
    fields = pack(Reply(client="a", round=0, samples=1, sent={})).fields
    sent = {f"sent:{key}": value for key, value in tensors.items() if value is not None}
    with pytest.raises(WireError, match="do not make products"):
        unpack(Reply, Payload(_deflated(serialised(sent)[0]), fields))


# -- budgets


def test_the_rank_that_fedits_bytes_buy() -> None:
    """52 x 384 at rank 2: 1744 bytes in bfloat16, 1776 at rank 8 in 4 bits, which count as equal."""
    layers = {"w": Layer("w", 52, 384, 2, scale=1.0, gradient_rank=51)}
    assert [affordable_rank(layers, 2, bits) for bits in (8, 4, 3)] == [4, 8, 10]


# -- partial starts and what check says


def test_a_head_of_few_classes_starts_in_the_directions_that_there_are_and_says_so_once(
    toy_federation: Federation, toy_table: dict[str, Any]
) -> None:
    """Four classes give gradients of three directions, and rank 2 wants four."""
    notes: list[str] = []

    class Notes(Callback):
        def on_note(self, text: str) -> None:
            notes.append(text)

    head = {"model.head": "lora", "lora.target_modules": [QUERY, "classifier"], "training.rounds": 2}
    with pytest.raises(ConfigError, match=r"method\.partial_start = true"):
        plan(read(toy_table, head))
    found = totals(toy_federation({**head, "method.preset": "low_bit"}), Notes())
    assert len([note for note in notes if "fewer directions" in note]) == 1
    assert found[-1]["loss"] < found[0]["loss"]


def test_check_shows_the_preset_resolved_and_what_rank_and_calibration_want(
    toy_table: dict[str, Any],
) -> None:
    console = Console(record=True, width=200, quiet=False, file=io.StringIO())
    overrides = {"method.preset": "low_bit", "method.zeta_schedule": "cosine", "lora.r": 10}
    check(read(toy_table, overrides), console)
    text = console.export_text()
    assert "preset low_bit: " in text
    assert "method.zeta = 0.0, method.zeta_schedule = 'cosine'" in text
    assert "transport.bits = 4" in text
    assert "rank: FedIT in bfloat16 at rank 10 sends as many bytes as rank 36 in 4 bits" in text
    assert "16 rows (method.calibration_batches" in text
    assert "take 20 rows or more" in text
