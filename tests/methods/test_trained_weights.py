"""``train = "weights"``: clients train whole weights, which travel as low-rank products."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedsmoothlora.algebra.coding import unpacked
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.federation.transport import Transport
from fedsmoothlora.methods import ClientView, Layer, Update
from fedsmoothlora.methods.fedsmoothlora import FedSmoothLoRA

RANK = 2
LAYERS = {
    name: Layer(name, m, n, RANK, scale=2.0, gradient_rank=min(m, n))
    for name, (m, n) in {"tall": (15, 11), "wide": (9, 18)}.items()
}
WEIGHTS: dict[str, Any] = {"train": "weights", "gradient_aligned": "none"}


def dense(value: Any) -> np.ndarray:
    value = unpacked(value)
    found = value.dense() if isinstance(value, LowRank) else value
    return np.asarray(found.double().numpy())


def svd(matrix: np.ndarray, rank: int) -> np.ndarray:
    U, sigma, Vt = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((U[:, :rank] * sigma[:rank]) @ Vt[:rank])


def changes(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(layer.m, layer.n, generator=draw) for name, layer in LAYERS.items()}


def view(kept: Update, bits: Any = 32, *, round: int = 1, received: Any = None) -> ClientView:
    def nothing(*_: Any) -> Any:
        raise AssertionError("not asked for")

    return ClientView(
        round=round,
        rounds=9,
        layers=LAYERS,
        server_lora={},
        kept=kept,
        kept_round=round - 1,
        received=received or {},
        gradients=nothing,
        initial=nothing,
        generator=nothing,
        code=Transport(bits).code,
        packs=bits < 16,
    )


def finished(simulation: Simulation) -> Simulation:
    for _ in run_rounds(simulation, Callback()):
        pass
    return simulation


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"client_feedback": True, "server_feedback": True}, id="feedback"),
        pytest.param({"exchange": "subspace"}, id="subspace"),
    ],
)
def test_at_full_rank_the_rounds_are_those_of_full_fine_tuning(
    toy_federation: Callable[..., Simulation], options: dict[str, Any]
) -> None:
    rank = 32
    lora = {"r": rank, "alpha": 2 * rank, "target_modules": ["attention"]}
    full = finished(toy_federation({"method": {"name": "full"}, "lora": lora}))
    method = {"name": "fedsmoothlora", **WEIGHTS, "zeta": 0.0, **options}
    ours = finished(toy_federation({"method": method, "lora": lora}))
    for name, layer in ours.server.layers.items():
        assert layer.rank == min(layer.m, layer.n)
        change = layer.scale * dense(ours.learner.model.backbone.merged(name))
        want = full.server.layers[name].scale * dense(full.learner.model.backbone.merged(name))
        np.testing.assert_allclose(change, want, rtol=1e-3, atol=1e-6)
        assert np.linalg.norm(want) > 1e-3
    for name, value in full.server.head.items():
        torch.testing.assert_close(ours.server.head[name], value, rtol=1e-4, atol=1e-6)


def test_clients_begin_at_their_round_match_and_upload_the_svd_of_their_change() -> None:
    method = FedSmoothLoRA(**WEIGHTS, zeta=0.5)
    last, server = changes(1), {name: LowRank.of(value) for name, value in changes(2).items()}
    kept = {name: LowRank.of(value) for name, value in last.items()}
    now = view(kept, received=server)
    start = method.start(now)
    assert list(start.trains) == ["W"]
    assert not start.lora
    trained = changes(3)
    found = method.upload(trained, start, now)
    for name in LAYERS:
        match = 0.5 * (last[name].double().numpy() - dense(server[name]))
        np.testing.assert_allclose(dense(start.shift[name]), match, atol=1e-5)
        want = svd(trained[name].double().numpy() + match, RANK)
        np.testing.assert_allclose(dense(found.sent[name]), want, atol=1e-4)
        np.testing.assert_array_equal(dense(found.kept[name]), dense(found.sent[name]))


@pytest.mark.parametrize("cut", [None, 99])
@pytest.mark.parametrize("bits", [32, 8, 4, 3])
def test_accepted_uploads_and_the_clients_memory_are_the_sum_of_its_changes(
    bits: Any, cut: int | None
) -> None:
    method = FedSmoothLoRA(**WEIGHTS, zeta=0.0, client_feedback=True, feedback_rank=cut)
    kept: Update = {}
    wanted = {name: np.zeros((x.m, x.n)) for name, x in LAYERS.items()}
    got = {name: np.zeros((x.m, x.n)) for name, x in LAYERS.items()}
    for t in range(12):
        now, trained = view(kept, bits), changes(t)
        start = method.start(now)
        upload = method.upload(trained, start, now)
        if t % 4 == 2:  # refused: the change is lost, and the memory stays as it was
            continue
        kept = upload.kept
        for name in LAYERS:
            wanted[name] += trained[name].double().numpy()
            got[name] += dense(upload.sent[name])
            assert isinstance(sent := unpacked(upload.sent[name]), LowRank)
            assert sent.rank <= RANK
    for name, total in wanted.items():
        left = dense(kept[f"feedback:{name}"])
        assert np.linalg.norm(left) > 0.01 * np.linalg.norm(total)
        assert np.linalg.norm(got[name] + left - total) <= 1e-5 * np.linalg.norm(total)


def test_a_clients_memory_is_cut_off_at_the_rank_that_is_set() -> None:
    now, trained = view({}, 4), changes(0)
    start = FedSmoothLoRA(**WEIGHTS, zeta=0.0).start(now)
    whole, cut = (
        FedSmoothLoRA(**WEIGHTS, zeta=0.0, client_feedback=True, feedback_rank=rank).upload(
            trained, start, now
        )
        for rank in (None, 2)
    )
    for name in LAYERS:
        left = dense(whole.kept[f"feedback:{name}"])
        np.testing.assert_allclose(dense(cut.kept[f"feedback:{name}"]), svd(left, 2), atol=1e-5)
    assert 0 < cut.metrics["feedback_cut"] < 1
    assert "feedback_cut" not in whole.metrics


def test_the_preset_feeds_back_at_both_ends() -> None:
    method = read("frozen-features", {"method.name": "fedsmoothlora", "method.preset": "weights"}).method
    assert isinstance(method, FedSmoothLoRA)
    assert (method.train, method.server_feedback, method.client_feedback) == ("weights", True, True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"train": "weights"}, r"method\.gradient_aligned = 'client' would do nothing"),
        ({**WEIGHTS, "start_mode": "exact"}, r"method\.start = 'exact' would do nothing"),
        ({**WEIGHTS, "partial_start": True}, r"method\.partial_start = True would do nothing"),
        ({**WEIGHTS, "calibration_step": True}, r"method\.calibration_step"),
        ({**WEIGHTS, "gradient": "sketch"}, r"method\.gradient = 'sketch'"),
        ({**WEIGHTS, "client_feedback": True}, r"client_feedback needs method\.zeta = 0"),
    ],
)
def test_options_of_a_loras_start_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        FedSmoothLoRA(**options).check(LAYERS, partial=False)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"model.dtype": "bfloat16"}, r"pretrained weights, but method\.train = 'weights' trains them"),
        (
            {"machine.batch_clients": 2},
            r"method\.train = 'weights' trains the weights, of which every client",
        ),
        ({"training.scaffold": True}, r"training\.scaffold = true .* method\.train = 'weights': the server"),
    ],
)
def test_settings_that_need_a_lora_are_refused(
    toy_federation: Callable[..., Simulation], overrides: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        toy_federation({"method.preset": "weights", **overrides})
