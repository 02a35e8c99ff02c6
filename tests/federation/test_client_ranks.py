"""Clients of different ranks have the same scale, exact averages, and a server with its own rank."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from families import by_family
from fedsmoothlora import methods
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.modeling.adapters import AdaptedModel
from fedsmoothlora.modeling.settings import LoraSettings
from fedsmoothlora.runs.planning import plan

Make = Callable[..., Simulation]
ABLE = [name for name in methods.names() if methods.find(name).traits.client_ranks]
UNABLE = [name for name in methods.names() if name not in ABLE]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=20), st.integers(1, 64))
def test_rules_give_every_client_a_rank_from_1_to_r(rows: list[int], r: int) -> None:
    counts = {str(client): count for client, count in enumerate(rows)}
    for rule in ("halving", "by_size"):
        ranks = LoraSettings(r=r, client_ranks=rule).ranks_of(counts)  # type: ignore[arg-type]
        assert list(ranks) == list(counts)
        assert all(1 <= rank <= r for rank in ranks.values())
    by_size = LoraSettings(r=r, client_ranks="by_size").ranks_of(counts)
    most = max(counts, key=lambda client: counts[client])
    assert by_size[most] == r
    for one in counts:
        for other in counts:
            if counts[one] <= counts[other]:
                assert by_size[one] <= by_size[other]


def test_halving_goes_down_to_one_and_begins_again() -> None:
    rows = {str(client): 5 for client in range(6)}
    assert list(LoraSettings(r=8, client_ranks="halving").ranks_of(rows).values()) == [8, 4, 2, 1, 8, 4]


@pytest.mark.parametrize("use_rslora", [True, False])
def test_all_ranks_have_the_same_scale(use_rslora: bool) -> None:
    torch.manual_seed(0)
    settings = LoraSettings(r=8, alpha=6, use_rslora=use_rslora, target_modules=("first", "second"), head_r=3)
    model = Two()
    x, plain = torch.randn(5, 10), None
    adapted = AdaptedModel(model, settings, head=["second"], head_is_trained_whole=False, ranks={8, 4, 1})
    with torch.no_grad():
        plain = model.first.base_layer(x)
    for rank in (1, 4, 8, 1):
        adapted.use_rank(rank)
        layers = adapted.layers_at(rank)
        assert {name: layer.rank for name, layer in layers.items()} == {"first": rank, "second": min(3, rank)}
        lora = {n: LowRank(torch.randn(x.m, x.rank), torch.randn(x.rank, x.n)) for n, x in layers.items()}
        adapted.load_lora(lora)
        for name, product in adapted.lora().items():
            assert torch.equal(product.B, lora[name].B)
        scale = adapted.layers["first"].scale
        assert scale == pytest.approx(6 / 8**0.5 if use_rslora else 6 / 8)
        with torch.no_grad():
            torch.testing.assert_close(model.first(x), plain + scale * x @ lora["first"].dense().mT)
        adapted.train_only(("B", "A"))
        names = set(adapted.trained_parameters())
        assert names == {"first.lora_B", "first.lora_A", "second.lora_B", "second.lora_A"}
        trained = [p for p in adapted.model.parameters() if p.requires_grad]
        assert {id(p) for p in trained} == {id(p) for p in adapted.trained_parameters().values()}


@pytest.mark.parametrize("method", by_family(ABLE))
def test_every_client_trains_and_uploads_its_own_rank_and_the_federation_learns(
    toy_federation: Make, method: str
) -> None:
    federation = toy_federation(
        {"method.name": method, "lora.r": 4, "lora.client_ranks": [4, 1, 2], "training.rounds": 4}
    )
    seen: dict[str, set[int]] = {}
    visit = federation.learner.visit

    def spy(client: str, *args: Any) -> Any:
        visited = visit(client, *args)
        reply, state = visited.reply, visited.state
        for value in (*reply.sent.values(), *state.uploads[max(state.uploads)].values()):
            if isinstance(value, LowRank):
                seen.setdefault(client, set()).add(value.rank)
        return visited

    object.__setattr__(federation.learner, "visit", spy)
    records = list(run_rounds(federation, Callback()))
    assert list(seen.values()) == [{4}, {1}, {2}]
    assert (records[-1].value("loss") or 99) < (records[0].value("loss") or 0)


def test_flora_merges_the_exact_mean_of_products_of_different_rank(toy_federation: Make) -> None:
    federation = toy_federation({"method.name": "flora", "lora.client_ranks": "halving", "lora.r": 4})
    rounds = run_rounds(federation, Callback())
    next(rounds)
    server, learner = federation.server, federation.learner
    means: dict[str, Tensor] = {}
    total = sum(len(rows) for rows in federation.clients.values())
    for client, rows in federation.clients.items():
        reply = learner.visit(client, rows, server.message(client), ClientState(), Callback()).reply
        for name, value in reply.sent.items():
            means[name] = means.get(name, 0) + len(rows) / total * value.dense()
    next(rounds)
    for name, mean in means.items():
        got = server.updates[0][name]
        assert isinstance(got, LowRank)
        torch.testing.assert_close(got.dense(), mean, rtol=1e-4, atol=1e-7)


def test_the_server_truncates_to_its_own_rank(toy_federation: Make) -> None:
    federation = toy_federation({"lora.r": 4, "lora.client_ranks": [1, 2, 1], "training.rounds": 1})
    list(run_rounds(federation, Callback()))
    assert {u.rank for u in federation.server.updates[0].values()} == {4}  # 1 + 2 + 1 directions fit


@pytest.mark.parametrize("method", UNABLE)
def test_methods_that_need_equal_ranks_refuse_different_ones(toy_table: dict[str, Any], method: str) -> None:
    overrides = {"method.name": method, "lora.client_ranks": "halving"}
    with pytest.raises(ConfigError, match=rf"client_ranks.*{method}.*{', '.join(ABLE)}"):
        plan(read(toy_table, overrides))


@pytest.mark.parametrize(
    ("ranks", "words"),
    [([2, 1], "2 ranks for 3 clients"), ([1, 9, 1], "rank 9.*lora.r = 2"), ([0, 1, 1], "client_ranks")],
)
def test_wrong_lists_are_refused(toy_table: dict[str, Any], ranks: list[int], words: str) -> None:
    with pytest.raises(ConfigError, match=re.compile(words)):
        plan(read(toy_table, {"lora.client_ranks": ranks}))


def test_an_unknown_rule_is_refused(toy_table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"client_ranks.*halving"):
        read(toy_table, {"lora.client_ranks": "quartering"})
