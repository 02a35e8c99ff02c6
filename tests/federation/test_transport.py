"""Factors coded in bfloat16: what the server merges is what it sends, and nothing is lost unseen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from families import by_family
from fedsmoothlora import methods
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError, InterruptedRunError
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.federation.transport import Transport
from fedsmoothlora.federation.uploads import check_replies
from fedsmoothlora.methods import Layer, ServerView
from fedsmoothlora.runs import session
from fedsmoothlora.runs.check import estimate
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.session import run

BF16 = Transport(16)
CODED = {"transport.bits": 16}
Federation = Callable[..., Simulation]


def by_hand(tensor: Tensor) -> Tensor:
    """A float32 rounded to 8 significant bits, ties to even, from its bits."""
    bits = tensor.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    signed = torch.where(rounded >= 2**31, rounded - 2**32, rounded)
    return signed.to(torch.int32).view(torch.float32)


@given(st.lists(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100), min_size=1, max_size=20))
def test_what_comes_is_what_was_sent_rounded_to_eight_bits_and_rounding_again_changes_nothing(
    values: list[float],
) -> None:
    factor = torch.tensor([values])
    product = LowRank(factor.mT, factor)
    came = BF16.rounded(product)
    assert came.dtype == torch.float32
    assert torch.equal(came.A, by_hand(factor))
    assert torch.equal(BF16.rounded(came).B, came.B)
    sent = BF16.coded({"product": product, "factor": factor})
    assert sum(value.nbytes for value in sent.values()) == (product.nbytes + factor.nbytes) // 2


@pytest.mark.parametrize("name", methods.names())
def test_every_method_is_coded_or_says_why_not(name: str, toy_table: dict[str, Any]) -> None:
    overrides = {"method.name": name, **CODED}
    why = methods.find(name).traits.float32_reason
    if not why:
        assert read(toy_table, overrides).transport.bits == 16
        return
    with pytest.raises(ConfigError, match=f"transport.bits = 16 does not work with method '{name}'"):
        read(toy_table, overrides)


def test_without_lora_there_is_nothing_to_code(toy_table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"there are none: lora\.target_modules is empty"):
        read(toy_table, {"lora.target_modules": [], **CODED})


WHO_SENDS_FACTORS = [name for name in methods.names() if not methods.find(name).traits.float32_reason]


@pytest.mark.parametrize("name", by_family(WHO_SENDS_FACTORS))
def test_factors_take_half_the_bytes_and_all_else_stays_float32(
    name: str, toy_federation: Federation
) -> None:
    def bytes_of(overrides: dict[str, Any]) -> tuple[list[int], list[int], int]:
        simulation = toy_federation({"method.name": name, **overrides})
        sent: list[Message] = []
        replies: list[Reply] = []
        real, judged = simulation.engine.train, []

        def watched(simulation: Any, clients: Any, message: Any, callback: Any) -> Any:
            def noted(client: str) -> Message:
                sent.append(message(client))
                return sent[-1]

            for answer in real(simulation, clients, noted, callback):
                replies.append(answer.reply)
                judged.append(answer.client)
                yield answer

        simulation.engine.train = watched  # type: ignore[method-assign]
        for _ in run_rounds(simulation, Callback()):
            pass
        head = sum(value.nbytes for value in simulation.server.head.values())
        for one in (*sent, *replies):
            assert all(value.dtype == torch.float32 for value in one.head.values())
        return [one.nbytes for one in sent], [one.nbytes for one in replies], head

    (down, up, head), (half_down, half_up, _) = bytes_of({}), bytes_of(CODED)
    assert [2 * (value - head) for value in half_up] == [value - head for value in up]
    # Sums of these are sent dense, in float32, where that is smaller.
    if name not in ("flora", "florist", "fedmomentum"):
        assert [2 * (value - head) for value in half_down] == [value - head for value in down]
    assert sum(half_down) < sum(down)


@pytest.mark.parametrize("name", by_family(WHO_SENDS_FACTORS))
def test_what_the_server_goes_on_from_is_what_it_sends(name: str, toy_federation: Federation) -> None:
    simulation = toy_federation({"method.name": name, "participation.clients": 2, **CODED})
    server = simulation.server
    for _ in run_rounds(simulation, Callback()):
        message = server.message("2")
        whole = server.transport.decoded(server.transport.coded(server.model))
        for layer, product in server.model.items():
            came = whole[layer]
            assert isinstance(came, LowRank)
            assert torch.equal(came.B, product.B)
            assert torch.equal(came.A, product.A)
        for value in message.lora.values():
            assert value.dtype == torch.bfloat16
        if server.round and (merged := server.updates[server.round - 1]):
            # A client of the last round is sent one update: the very bits that were merged.
            client = next(c for c, round in server.received.items() if round == server.round - 1)
            sent = server.message(client).updates
            for layer, update in merged.items():
                found = sent[layer]
                if isinstance(found, LowRank):
                    assert isinstance(update, LowRank)
                    assert torch.equal(found.B, update.B)
                    assert torch.equal(found.A, update.A)
                else:
                    assert found.dtype == torch.float32


def test_a_clients_own_upload_is_kept_uncoded(toy_federation: Federation) -> None:
    simulation = toy_federation(CODED)
    learner, server = simulation.learner, simulation.server
    for _ in range(2):
        visited = learner.visit("0", simulation.clients["0"], server.message("0"), ClientState(), Callback())
        reply, state = visited.reply, visited.state
        kept = state.uploads[server.round]
        for name, value in reply.sent.items():
            own = kept[name]
            assert isinstance(value, LowRank)
            assert isinstance(own, LowRank)
            assert own.dtype == torch.float32
            assert torch.equal(value.B, own.B.to(torch.bfloat16))
            assert not torch.equal(value.B.float(), own.B)
        assert check_replies([reply], server.reply_spec({"0": reply.samples}), simulation.uploads).accepted
        server.delivered("0")
        learner.model.backbone.merge(server.aggregate([reply]).merge)


def test_uploads_in_other_numbers_than_agreed_are_refused(toy_federation: Federation) -> None:
    simulation, coded = toy_federation(), toy_federation(CODED)
    reply = simulation.learner.visit(
        "0", simulation.clients["0"], simulation.server.message("0"), ClientState(), Callback()
    ).reply
    checked = check_replies([reply], coded.server.reply_spec({"0": reply.samples}), coded.uploads)
    ((_, why),) = checked.refused
    assert "got a tensor of torch.float32" in why
    assert "torch.bfloat16" in why


M, N, RANK = 14, 11, 2


@pytest.mark.parametrize("name", ["fedsmoothlora", "flexlora"])
def test_server_feedback_takes_up_what_coding_loses(name: str) -> None:
    """``sum of S + E = sum of averages``: at zeta 0 nothing is lost, in spite of 8-bit factors."""
    options: dict[str, Any] = {"server_feedback": True, **({"zeta": 0.0} if "smooth" in name else {})}
    method = methods.find(name)(**options)
    layers = {"w": Layer("w", M, N, RANK, scale=1.0, gradient_rank=N)}
    total, merged = torch.zeros(M, N, dtype=torch.float64), torch.zeros(M, N, dtype=torch.float64)
    memory: Any = {}
    for t in range(20):
        draw = torch.Generator().manual_seed(t)
        uploads = [
            BF16.coded(
                {"w": LowRank(torch.randn(M, RANK, generator=draw), torch.randn(RANK, N, generator=draw))}
            )
            for _ in range(3)
        ]
        view = ServerView(round=t, rounds=20, layers=layers, memory=memory, code=BF16.code)
        update = method.aggregate(uploads, [1, 2, 1], view)
        memory = update.memory
        sent = update.merge.get("w", update.model.get("w"))
        assert isinstance(sent, LowRank)
        assert torch.equal(sent.B.float(), by_hand(sent.B.float()))
        merged += sent.B.double() @ sent.A.double()
        for p, upload in zip((0.25, 0.5, 0.25), uploads, strict=True):
            factors = upload["w"]
            assert isinstance(factors, LowRank)
            total += p * factors.B.double() @ factors.A.double()
    left = memory["w"].B.double() @ memory["w"].A.double()
    assert float(left.norm()) > 0.05 * float(total.norm())  # or the test says nothing
    assert float((merged + left - total).norm()) <= 1e-5 * float(total.norm())


def test_a_resumed_coded_run_is_the_same_to_the_bit(toy_table: dict[str, Any], tmp_path: Path) -> None:
    overrides = {"participation.clients": 2, "method.server_feedback": True, "method.zeta": 0.0, **CODED}
    config = read(toy_table, overrides)
    quiet = Console(quiet=True)
    whole = run(config, out=tmp_path / "whole", console=quiet).folder
    real = session.Checkpoints.save
    stopped = []

    def save(self: Any, server: Any, *rest: Any) -> None:
        real(self, server, *rest)
        if server.round == 1 and not stopped:
            stopped.append(True)
            raise InterruptedRunError("stopped by the test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Checkpoints, "save", save)
        with pytest.raises(InterruptedRunError):
            run(config, out=tmp_path / "parted", console=quiet)
    parted = run(config, resume=tmp_path / "parted", console=quiet).folder
    for path in sorted((whole / "updates").iterdir()):
        right, got = load_file(path), load_file(parted / "updates" / path.name)
        assert {value.dtype for value in right.values()} == {torch.bfloat16}
        assert all(torch.equal(value, got[name]) for name, value in right.items())
    right, got = (load_file(folder / "model" / "model.safetensors") for folder in (whole, parted))
    assert all(torch.equal(value, got[name]) for name, value in right.items())


@pytest.mark.parametrize("overrides", [{}, {"method.name": "fedit", "training.scaffold": True}])
def test_check_counts_the_bytes_that_a_run_sends(
    toy_table: dict[str, Any], overrides: dict[str, Any], toy_federation: Federation
) -> None:
    overrides = {**CODED, **overrides}
    if "training.scaffold" in overrides:
        overrides |= {"training.momentum": 0.0, "training.max_grad_norm": None}
    simulation = toy_federation(overrides)
    metrics = [record.metrics for record in run_rounds(simulation, Callback())][-1]
    totals = {metric.name: metric.value for metric in metrics if metric.client is None}
    costs = estimate(plan(read(toy_table, overrides)))
    assert (totals["bytes_up"], totals["bytes_down"]) == (3 * costs.up, 3 * costs.down)
