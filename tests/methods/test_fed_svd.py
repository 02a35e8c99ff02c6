"""FedSVD against its formula: an exact mean, and rows of A that are orthonormal and stay in their space."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracles import (
    LAYERS,
    RANK,
    client_view,
    close,
    dense,
    initial,
    mean,
    method,
    products,
    server_view,
    three,
)

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.errors import LostStateError
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.runs.planning import plan


def played(rounds: int, **options: Any) -> list[tuple[dict[str, LowRank], dict[str, np.ndarray]]]:
    """The global LoRA after every round of three clients, and the mean product of the clients."""
    fed_svd, found = method("fed_svd", **options), []
    model: dict[str, LowRank] = {}
    views = [client_view(0)] * 3
    for t in range(rounds):
        starts = [fed_svd.start(view) for view in views]
        trained = [
            {name: LowRank(moved[name].B, start.lora[name].A) for name in LAYERS}
            for start, moved in zip(starts, three(40 * t), strict=True)
        ]
        uploads = [fed_svd.upload(one, start, views[0]) for one, start in zip(trained, starts, strict=True)]
        update = fed_svd.aggregate(
            [upload.sent for upload in uploads], (3, 1, 4), server_view(t, model=model)
        )
        assert not update.merge
        model = dict(update.model)
        sent = update.model if update.lora is None else update.lora
        views = [client_view(t + 1, server_lora=sent, kept=upload.kept) for upload in uploads]
        found.append((model, {n: mean([dense(one[n]) for one in trained]) for n in LAYERS}))
    return found


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_global_product_is_exactly_the_mean_of_products(every: int) -> None:
    for model, want in played(6, refactor_every=every):
        for name in LAYERS:
            close(dense(model[name]), want[name])


@pytest.mark.parametrize("every", [1, 2, 3])
def test_after_an_svd_the_factors_are_singular_vectors_and_in_between_they_stay(every: int) -> None:
    before = {name: initial(name) for name in LAYERS}
    for t, (model, want) in enumerate(played(6, refactor_every=every)):
        for name in LAYERS:
            A, B = model[name].A, model[name].B
            if (t + 1) % every:
                assert torch.equal(A, before[name].A)
            else:
                sigma = np.linalg.svd(want[name], compute_uv=False)[:RANK]
                close((A @ A.mT).numpy(), np.eye(RANK))
                close((B.mT @ B).numpy(), np.diag(sigma**2))
            # Every row is a combination of the rows of the initial A.
            rows = np.linalg.svd(initial(name).A.numpy(), full_matrices=False)[2]
            close(A.numpy() @ rows.T @ rows, A.numpy())
        before = model


def test_the_rows_of_A_keep_their_space_when_B_is_zero_or_of_lower_rank() -> None:
    fed_svd = method("fed_svd")
    for scale in (0.0, 1.0):
        uploads = [{n: scale * torch.ones(x.m, RANK, dtype=torch.float64) for n, x in LAYERS.items()}]
        update = fed_svd.aggregate(uploads, (1,), server_view())
        for name in LAYERS:
            A = update.model[name].A
            close((A @ A.mT).numpy(), np.eye(RANK))
            close(dense(update.model[name]), uploads[0][name].numpy() @ initial(name).A.numpy())


def test_only_B_is_trained_and_sent_and_A_is_kept_while_it_lasts() -> None:
    trained = products(5)
    for every, keeps in ((1, False), (2, True)):
        fed_svd = method("fed_svd", refactor_every=every)
        start = fed_svd.start(client_view())
        assert tuple(start.trains) == ("B",)
        upload = fed_svd.upload(trained, start, client_view())
        assert all(torch.equal(upload.sent[name], trained[name].B) for name in LAYERS)
        assert (set(upload.kept) == set(LAYERS)) is keeps


def test_a_client_without_the_A_that_it_should_have_cannot_start() -> None:
    sent = {name: product.B for name, product in products(3).items()}
    with pytest.raises(LostStateError, match="factor A of layer tall"):
        method("fed_svd", refactor_every=2).start(client_view(1, server_lora=sent))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"transport.bits": 4}, "each SVD replaces both factors"),
        ({"server.optimizer": "adam"}, "columns of B belong to other directions"),
        ({"training.scaffold": True}, "change their meaning in every round"),
        ({"lora.client_ranks": "halving"}, "must all have one"),
        ({"method.refactor_every": 0}, r"method\.refactor_every"),
    ],
    ids=["few bits", "server optimiser", "SCAFFOLD", "ranks", "no round"],
)
def test_settings_that_do_not_fit_are_refused_with_the_reason(
    toy_table: dict[str, Any], overrides: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        plan(read(toy_table, {"method.name": "fed_svd", **overrides}))


@pytest.mark.parametrize("every", [1, 2])
def test_clients_that_missed_rounds_start_from_the_servers_factors(
    toy_federation: Callable[..., Simulation], every: int
) -> None:
    federation = toy_federation(
        {
            "method.name": "fed_svd",
            "method.refactor_every": every,
            "participation.clients": 2,
            "training.rounds": 5,
        }
    )
    visit, server, compared = federation.learner.visit, federation.server, []

    def spy(client: str, *args: Any) -> Any:
        before = dict(server.model)
        visited = visit(client, *args)
        for name, product in federation.learner.model.lora().items():
            if before:
                assert torch.equal(product.A, before[name].A)
                compared.append(client)
        return visited

    object.__setattr__(federation.learner, "visit", spy)
    for _ in run_rounds(federation, Callback()):
        pass
    assert set(compared) == set(federation.clients)
