"""Ranks by energy: ``server_rank = "energy:SHARE"``, and ``layer_ranks = "energy"`` at the fixed bytes."""

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fedsmoothlora.algebra.coding import coded_product, unpacked
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.ranks import allocated_ranks
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError, InterruptedRunError
from fedsmoothlora.federation.messages import Reply
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.settings import UploadSettings
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.federation.transport import Transport
from fedsmoothlora.federation.uploads import check_replies
from fedsmoothlora.methods import ClientView, Layer, ServerUpdate, ServerView, Start, Update
from fedsmoothlora.methods.fedsmoothlora import FedSmoothLoRA
from fedsmoothlora.methods.flexlora import FlexLoRA
from fedsmoothlora.runs import session
from fedsmoothlora.runs.check import estimate
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.session import run

RANK, COUNTS, ROUNDS = 2, (3, 1, 4), 12
LAYERS = {
    "tall": Layer("tall", 15, 11, RANK, scale=2.0, gradient_rank=11),
    "wide": Layer("wide", 9, 18, RANK, scale=2.0, gradient_rank=9),
    "strong": Layer("strong", 9, 18, RANK, scale=6.0, gradient_rank=9),
}
ENERGY = {"layer_ranks": "energy"}
Federation = Callable[..., Simulation]


def dense(value: Any) -> np.ndarray:
    value = unpacked(value)
    matrix = value.B.double() @ value.A.double() if isinstance(value, LowRank) else value.double()
    return np.asarray(matrix)


def drawn(seed: int, rank: int = RANK, sizes: Mapping[str, float] | None = None) -> dict[str, LowRank]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(
            (sizes or {}).get(name, 1.0) * torch.randn(layer.m, rank, generator=draw),
            torch.randn(rank, layer.n, generator=draw),
        )
        for name, layer in LAYERS.items()
    }


def mean(uploads: list[Update], name: str) -> np.ndarray:
    weights = np.array(COUNTS) / sum(COUNTS)
    return sum(p * dense(upload[name]) for p, upload in zip(weights, uploads, strict=True))  # type: ignore


def play(
    method: FedSmoothLoRA, bits: Any, each: Callable[[dict[str, np.ndarray], ServerUpdate], None]
) -> None:
    """Rounds of the server alone; checks at their end that nothing is lost. At zeta 0, with feedback."""
    transport, memory = Transport(bits), {}
    totals = {name: np.zeros((x.m, x.n)) for name, x in LAYERS.items()}
    for t in range(ROUNDS):
        coded = [transport.coded(drawn(100 * t + c)) for c in range(3)]
        uploads: list[Update] = [{name: unpacked(one) for name, one in upload.items()} for upload in coded]
        view = ServerView(
            round=t,
            rounds=ROUNDS,
            layers=LAYERS,
            memory=memory,
            code=transport.code,
            packs=transport.packs,
            nbytes=transport.product_bytes,
        )
        matrices = {
            name: mean(uploads, name) + (dense(memory[name]) if name in memory else 0.0) for name in LAYERS
        }
        update = method.aggregate(uploads, COUNTS, view)
        each(matrices, update)
        memory = dict(update.memory)
        for name in LAYERS:
            totals[name] += mean(uploads, name) - dense(update.merge[name])
    for name, wanted in totals.items():
        assert np.linalg.norm(wanted) > 1
        np.testing.assert_allclose(dense(memory[name]), wanted, atol=1e-3)


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("cap", [None, 7])
@pytest.mark.parametrize("share", ["0.3", "0.6"])
def test_the_servers_rank_is_the_smallest_that_holds_the_share(
    share: str, cap: int | None, bits: Any
) -> None:
    ranks = set()

    def check(matrices: dict[str, np.ndarray], update: ServerUpdate) -> None:
        for name, matrix in matrices.items():
            held = np.cumsum(np.linalg.svd(matrix, compute_uv=False) ** 2) / np.sum(matrix**2)
            k = min(int(np.argmax(held >= float(share))) + 1, cap or RANK)
            assert unpacked(update.merge[name]).rank == k  # type: ignore[union-attr]
            ranks.add(k)

    rule = {"server_rank": f"energy:{share}", "server_rank_cap": cap}
    play(FedSmoothLoRA(zeta=0.0, server_feedback=True, **rule), bits, check)  # type: ignore[arg-type]
    assert cap is None or len(ranks) > 1


@pytest.mark.parametrize("bits", [32, 16, 4])
def test_the_server_sends_the_directions_with_the_most_energy_per_byte(bits: Any) -> None:
    transport = Transport(bits)
    budget = sum(transport.product_bytes(layer, RANK) for layer in LAYERS.values())
    found: list[tuple[int, ...]] = []

    def check(matrices: dict[str, np.ndarray], update: ServerUpdate) -> None:
        ranks = {name: unpacked(update.merge[name]).rank for name in LAYERS}  # type: ignore[union-attr]
        assert sum(transport.product_bytes(LAYERS[name], k) for name, k in ranks.items()) <= budget
        assert sum(value.nbytes for value in transport.coded(update.merge).values()) <= budget
        energies = {
            name: torch.from_numpy((LAYERS[name].scale * np.linalg.svd(matrix, compute_uv=False)) ** 2)
            for name, matrix in matrices.items()
        }
        most = {name: values[: 2 * RANK] for name, values in energies.items()}
        assert ranks == allocated_ranks(
            most, lambda name, k: transport.product_bytes(LAYERS[name], k), budget
        )
        found.append(tuple(ranks.values()))

    play(FedSmoothLoRA(zeta=0.0, server_feedback=True, **ENERGY), bits, check)  # type: ignore[arg-type]
    assert found[0][2] > max(found[0][:2])  # of the layer whose scale is three times as large
    assert len(set(found)) > 1


def upload(method: FedSmoothLoRA, trained: Update, shift: Update, kept: Update, bits: Any) -> Any:
    def nothing(*_: Any) -> Any:
        raise AssertionError("not asked for")

    transport = Transport(bits)
    view = ClientView(
        round=1,
        rounds=9,
        layers=LAYERS,
        server_lora={},
        kept=kept,
        kept_round=0,
        received={},
        gradients=nothing,
        initial=nothing,
        generator=nothing,
        code=transport.code,
        packs=transport.packs,
        nbytes=transport.product_bytes,
    )
    return method.upload(trained, Start(lora=trained, shift=shift), view)  # type: ignore[arg-type]


@pytest.mark.parametrize("feeds_back", [False, True])
@pytest.mark.parametrize("bits", [32, 4, 3])
def test_a_client_sends_more_of_the_layer_that_changed_more_within_the_same_bytes(
    bits: Any, feeds_back: bool
) -> None:
    method = FedSmoothLoRA(
        zeta=0.0, client_feedback=feeds_back, feedback_rank=99 if feeds_back else None, **ENERGY
    )  # type: ignore[arg-type]
    transport = Transport(bits)
    budget = sum(transport.product_bytes(layer, RANK) for layer in LAYERS.values())
    totals, kept = {name: np.zeros((x.m, x.n)) for name, x in LAYERS.items()}, {}
    for t in range(6):
        trained = drawn(t, sizes={"tall": 20.0, "strong": 0.01})
        shift = drawn(50 + t, sizes={"tall": 20.0, "strong": 0.01})
        found = upload(method, trained, shift, kept, bits)
        sent = {name: unpacked(transport.coded({name: value})[name]) for name, value in found.sent.items()}
        assert sum(value.nbytes for value in transport.coded(found.sent).values()) <= budget
        ranks = {name: value.rank for name, value in sent.items()}
        assert ranks["tall"] == method.upload_rank(LAYERS["tall"]) == 2 * RANK
        assert t or ranks["strong"] == 0
        kept = found.kept
        for name in LAYERS:
            totals[name] += dense(trained[name]) + dense(shift[name]) - dense(sent[name])
    if feeds_back:
        for name, wanted in totals.items():
            np.testing.assert_allclose(dense(kept[f"feedback:{name}"]), wanted, atol=1e-3)


def test_a_round_that_changed_nothing_sends_nothing() -> None:
    zeros: Update = {name: LowRank.zeros(x.m, x.n) for name, x in LAYERS.items()}
    for options in (ENERGY, {"server_rank": "energy:0.9"}):
        for bits in (32, 4):
            transport = Transport(bits)  # type: ignore[arg-type]
            method = FedSmoothLoRA(zeta=0.0, server_feedback=True, **options)  # type: ignore[arg-type]
            view = ServerView(round=0, rounds=2, layers=LAYERS, code=transport.code, packs=transport.packs)
            update = method.aggregate([zeros] * 3, COUNTS, view)
            assert all(not dense(value).any() for value in update.merge.values())


def test_flexlora_keeps_the_ranks_that_hold_the_share_and_fills_the_rest_with_new_directions() -> None:
    method = FlexLoRA(server_rank="energy:0.6")
    uploads: list[Update] = [drawn(c) for c in range(3)]
    update = method.aggregate(uploads, COUNTS, ServerView(round=0, rounds=2, layers=LAYERS))
    for name in LAYERS:
        matrix = mean(uploads, name)
        held = np.cumsum(np.linalg.svd(matrix, compute_uv=False) ** 2) / np.sum(matrix**2)
        assert update.model[name].rank == min(int(np.argmax(held >= 0.6)) + 1, RANK)
    with pytest.raises(ConfigError, match="write energy:SHARE"):
        FlexLoRA(server_rank="energy:0").check(LAYERS, partial=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server_rank": "energy:1.5"}, "write energy:SHARE with a share above 0"),
        ({"server_rank": "energy:nan"}, "write energy:SHARE"),
        ({"server_rank": "8"}, "write energy:SHARE"),
        ({"server_rank_cap": 4}, "server_rank_cap = 4 belongs to"),
        ({"server_rank": 4, "server_rank_cap": 4}, "server_rank_cap = 4 belongs to"),
        ({"server_rank": "energy:0.9", **ENERGY}, "two rules"),
    ],
)
def test_rules_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FedSmoothLoRA(partial_start=True, **options).check(LAYERS, partial=False)


def test_the_example_of_the_documentation_is_valid() -> None:
    page = (Path(__file__).parents[2] / "docs" / "comparing.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    chosen = tomllib.loads(example)["method"]
    config = read("minilm-bbc", {"method": chosen})
    assert config.method.options()["layer_ranks"] == "energy"
    assert config.transport.bits == 4


def test_one_layer_has_nothing_to_share_out() -> None:
    one = {"tall": LAYERS["tall"]}
    with pytest.raises(ConfigError, match="tall is the only adapted one"):
        FedSmoothLoRA(partial_start=True, **ENERGY).check(one, partial=False)  # type: ignore[arg-type]


# -- whole federations


CHOSEN = {
    "layers": {"method.layer_ranks": "energy"},
    "layers and ranks of clients": {"method.layer_ranks": "energy", "lora.client_ranks": "halving"},
    "layers with client feedback": {"method.layer_ranks": "energy", "method.client_feedback": True},
    "share": {"method.server_rank": "energy:0.8", "method.server_rank_cap": 4},
}


def options(name: str, bits: int) -> dict[str, Any]:
    return {"method.zeta": 0.0, "method.server_feedback": True, "transport.bits": bits, **CHOSEN[name]}


@pytest.mark.parametrize(("name", "bits"), [("layers", 32), ("layers with client feedback", 4), ("share", 4)])
def test_no_round_sends_more_than_check_says(
    name: str, bits: int, toy_federation: Federation, toy_table: dict[str, Any]
) -> None:
    simulation = toy_federation({**options(name, bits), "training.rounds": 4})
    costs = estimate(plan(read(toy_table, options(name, bits))))
    ranks = set()
    for record in run_rounds(simulation, Callback()):
        if record.round:
            assert record.value("refused") == 0
            assert 0 < record.value("bytes_up") <= 3 * costs.up  # type: ignore[operator]
            if record.round > 1:  # the first message has the whole head, later ones its change
                assert record.value("bytes_down") <= 3 * costs.down  # type: ignore[operator]
            ranks |= {unpacked(value).rank for value in simulation.server.updates[-1].values()}  # type: ignore[union-attr]
    assert len(ranks) > 1
    fixed = estimate(plan(read(toy_table, {"method.zeta": 0.0, "transport.bits": bits})))
    if name != "share":
        assert (costs.up, costs.down) == (fixed.up, fixed.down)


@pytest.mark.parametrize("bits", [32, 4])
def test_replies_of_more_directions_or_more_bytes_are_refused(bits: Any, toy_federation: Federation) -> None:
    server = toy_federation({**options("layers", bits)}).server
    draw = torch.Generator().manual_seed(0)

    def reply(client: str, ranks: Callable[[Layer, int], int]) -> Reply:
        sent = {}
        for place, (name, layer) in enumerate(server.layers.items()):
            k = ranks(layer, place)
            B, A = torch.randn(layer.m, k, generator=draw), torch.randn(k, layer.n, generator=draw)
            sent[name] = coded_product(LowRank(B, A), bits) if bits < 16 else LowRank(B, A)
        head = {name: torch.zeros_like(value) for name, value in server.head.items()}
        if bits < 16:
            head = {name: value.bfloat16() for name, value in head.items()}
        return Reply(client=client, round=0, samples=5, sent=sent, head=head)

    replies = [
        reply("0", lambda layer, place: layer.rank),
        reply("1", lambda layer, place: 2 * layer.rank * (place == 0)),
        reply("2", lambda layer, place: 2 * layer.rank + 1 if place == 0 else 0),
        reply("3", lambda layer, place: layer.rank + (place == 0)),
    ]
    spec = server.reply_spec(dict.fromkeys("0123", 5))
    found = check_replies(replies, replace(spec, experiment=""), UploadSettings(max_norm_factor=1e9))
    assert [one.client for one in found.accepted] == ["0", "1"]
    reasons = {one.client: reason for one, reason in found.refused}
    assert "at most" in reasons["2"]
    assert f"they may have {spec.product_bytes}" in reasons["3"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layers with client feedback", "share"])
def test_a_resumed_run_is_the_same_to_the_bit_with_clients_that_miss_rounds(
    name: str, toy_table: dict[str, Any], tmp_path: Path
) -> None:
    config = read(toy_table, {**options(name, 4), "participation.clients": 2, "training.rounds": 4})
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
