"""Rounds with secure aggregation: sites in this process, all stages as Flower's messages."""

from __future__ import annotations

import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from machines import SITES
from safetensors.torch import load_file

pytest.importorskip("flwr")
from flwr.app import Context, Message
from test_flower_engine import Answer, DirectGrid, Setting, metrics, setting

from fedsmoothlora import methods
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.errors import FederationStoppedError, SiteError
from fedsmoothlora.federation.messages import Message as RoundMessage
from fedsmoothlora.federation.payload import Payload
from fedsmoothlora.federation.server import Server
from fedsmoothlora.flower.keys import write_node_key
from fedsmoothlora.flower.records import to_records
from fedsmoothlora.flower.site import Site
from fedsmoothlora.flower.trusted import trusted_sites
from fedsmoothlora.secure_aggregation.fixed_point import FixedPoint
from fedsmoothlora.secure_aggregation.messages import Revealed
from fedsmoothlora.secure_aggregation.serialization import dumped, loaded
from fedsmoothlora.secure_aggregation.site import Advertised

__all__ = ["setting"]  # the fixture

MASKED = {
    "method.name": "fedit",
    "privacy.secure_aggregation": True,
    "privacy.most_rows": 40,
    "training.rounds": 2,
    "training.steps": 1,
}
STAGES = ["query.advertise", "query.share", "train.masked", "query.confirm", "query.reveal"]


def unmasked(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in overrides.items() if not key.startswith("privacy.")}


def masked_grid(setting: Setting, overrides: Mapping[str, Any] = MASKED) -> DirectGrid:
    """A grid whose sites have keys, and trust each other's."""
    setting.table["method"] = {"name": "fedsmoothlora"}
    grid = setting.grid(overrides)
    keys = setting.root / "keys"
    if not keys.exists():
        for site in SITES:
            write_node_key(keys / f"{site}.key")
        trusted_sites(keys).write(setting.root / "sites.toml")
    for node, values in grid.nodes.items():
        site = values["client-id"]
        grid.keys[node] = (keys / f"{site}.key.pub").read_bytes()
        values |= {"key": str(keys / f"{site}.key"), "sites": str(setting.root / "sites.toml")}
    return grid


def assert_close(one: Path, other: Path, tolerance: float = 2e-5) -> None:
    right, found = (load_file(path / "model" / "model.safetensors") for path in (one, other))
    for name, value in right.items():
        assert float((value - found[name]).norm()) <= tolerance * float(value.norm()), name


def assert_same_bits(one: Path, other: Path) -> None:
    right, found = (load_file(path / "model" / "model.safetensors") for path in (one, other))
    assert all(torch.equal(value, found[name]) for name, value in right.items())


def test_the_model_is_that_of_unmasked_rounds(setting: Setting) -> None:
    grid = masked_grid(setting)
    found = setting.coordinate(grid)
    assert_close(setting.in_process(unmasked(MASKED)), found)
    kinds = [kind for client, kind in grid.asked if client == "hospital-a"]
    assert kinds == ["query.agree", *STAGES, *STAGES]
    recorded = metrics(found)
    assert not [key for key in recorded if key[1] is not None]
    assert recorded[1, None, "clients"] == 3
    assert recorded[1, None, "numbers_cut"] == 0


@pytest.mark.slow
def test_a_shared_subspace_has_two_sums_in_a_round(setting: Setting) -> None:
    overrides = {
        **{key: value for key, value in MASKED.items() if not key.startswith("method.")},
        **{"method.exchange": "subspace", "method.zeta": 0.0, "method.gamma": 64.0},
    }
    grid = masked_grid(setting, overrides)
    found = setting.coordinate(grid)
    assert_close(setting.in_process(unmasked(overrides)), found)
    kinds = [kind for client, kind in grid.asked if client == "hospital-a"]
    assert kinds == ["query.agree", *STAGES * 4]


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("rolora", "full") else pytest.mark.release)
        for name in methods.with_trait("sums_tensors")
        if name != "fedit" and methods.find(name).traits.global_model
    ],
)
def test_every_method_whose_aggregate_is_a_sum(setting: Setting, method: str) -> None:
    """With clients that miss rounds, and a head that is trained whole."""
    overrides = {**MASKED, "method.name": method, "training.rounds": 3}
    assert_close(setting.in_process(unmasked(overrides)), setting.coordinate(masked_grid(setting, overrides)))


@pytest.mark.slow
def test_rows_that_are_private_too(setting: Setting) -> None:
    """Sites train with DP-SGD, and mask: the sum is that of private uploads, with the largest epsilon."""
    pytest.importorskip("opacus")
    private = {
        **{"privacy.unit": "sample", "privacy.clip_norm": 1.0, "privacy.noise_multiplier": 1.0},
        "lora.dropout": 0.0,
        **{"privacy.delta": 1e-5, "privacy.sample_rate": 0.1, "privacy.seed": 3},
    }
    overrides = {**MASKED, **private}
    del overrides["privacy.most_rows"]
    found = setting.coordinate(masked_grid(setting, overrides))
    right = setting.in_process(unmasked(overrides) | private)
    assert_close(right, found)
    epsilon = metrics(found)[2, None, "epsilon"]
    assert epsilon == pytest.approx(metrics(right)[2, None, "epsilon"])
    assert not [key for key in metrics(found) if key[1] is not None]


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("fedit", "full") else pytest.mark.release)
        for name in methods.with_trait("sums_tensors")
        if methods.find(name).traits.uses_mean_only and methods.find(name).traits.global_model
    ],
)
def test_clients_that_are_private_too(setting: Setting, method: str) -> None:
    """Sites clip, and the coordinator adds noise to the sum: it is the model of a coordinator that clips."""
    pytest.importorskip("opacus")
    private = {
        **{"privacy.unit": "client", "privacy.clip_norm": 0.05, "privacy.noise_multiplier": 0.5},
        **{"privacy.delta": 1e-5, "privacy.seed": 3},
    }
    overrides = {**MASKED, **private, "method.name": method, "training.rounds": 3}
    del overrides["privacy.most_rows"]
    found = setting.coordinate(masked_grid(setting, overrides))
    right = setting.in_process(unmasked(overrides) | private)
    assert_close(right, found)
    assert metrics(found)[3, None, "epsilon"] == metrics(right)[3, None, "epsilon"]
    assert not [key for key in metrics(found) if key[1] is not None]
    with pytest.raises(AssertionError):
        assert_close(setting.in_process(unmasked(overrides)), found)  # without clipping and noise


@pytest.mark.slow
def test_a_site_that_loses_its_state_is_sent_all_updates_again(setting: Setting) -> None:
    grid = masked_grid(setting, {**MASKED, "training.rounds": 3})
    lost = iter([False, False, True])

    def forgetful(message: Message, context: Context, app: Answer) -> Message:
        if message.metadata.message_type == STAGES[0] and next(lost):
            shutil.rmtree(str(context.node_config["state"]))
        return app(message, context)

    grid.stand_in[next(iter(grid.nodes))] = forgetful
    found = setting.coordinate(grid)
    assert_close(setting.in_process(unmasked({**MASKED, "training.rounds": 3})), found)
    assert Counter(kind for client, kind in grid.asked if client == "hospital-a")["train.masked"] == 4


# -- what the coordinator sees


def test_the_coordinator_receives_no_upload_and_nothing_else_of_a_site(setting: Setting) -> None:
    """All replies are inspected; the integers without masks are computed from the sites' own training."""
    seen: list[tuple[str, str, Message]] = []
    plain: dict[str, Any] = {}

    def recorded(message: Message, context: Context, app: Answer) -> Message:
        reply = app(message, context)
        seen.append((str(context.node_config["client-id"]), message.metadata.message_type, reply))
        return reply

    grid = masked_grid(setting, {**MASKED, "training.rounds": 1})
    for node in grid.nodes:
        grid.nodes[node]["histogram"] = True  # the site would show its labels, but masks go first
        grid.stand_in[node] = recorded
    with pytest.MonkeyPatch.context() as patch:
        encode = FixedPoint.encode

        def spied(code: FixedPoint, tensors: Any, weight: float) -> Any:
            numbers = encode(code, tensors, weight)
            plain[f"{weight:.6f}"] = numbers
            return numbers

        patch.setattr(FixedPoint, "encode", spied)
        folder = setting.coordinate(grid)

    assert {kind for _, kind, _ in seen} == {"query.agree", *STAGES}
    masked = {}
    for client, kind, message in seen:
        tables = {name: dict(table) for name, table in message.content.config_records.items()}
        assert tables.pop("status") == {"status": "done"}
        assert not message.content.metric_records
        if kind == "query.agree":
            info = tables.pop("site_info")
            assert (info["samples"], info["validation"], info["histogram"]) == (1, 0, [])
            assert not message.content.array_records
        else:
            assert tables.pop("fields") == {}
            data = message.content["tensors"]["file"].data
            if kind == "train.masked":
                masked[client] = data
            else:
                assert len(data) < 10_000
        assert tables == {}
    weights = {client: f"{rows / 40:.6f}" for client, rows in SITES.items()}
    total = 0
    for client, data in masked.items():
        own = plain[weights[client]]
        numbers = np.frombuffer(data[-own.nbytes :], own.dtype)
        total = total + own
        assert np.count_nonzero(numbers == own) <= 1
        # A mask is uniform: about half of its bits are set, and its bytes cannot be compressed.
        assert len(zlib.compress(numbers.tobytes())) > 0.99 * numbers.nbytes
        assert len(zlib.compress(own.tobytes())) < 0.9 * own.nbytes
        assert own[:100].tobytes() not in data
    kept = np.frombuffer((folder / "sums" / "0001-0").read_bytes(), np.dtype("<u4"))
    assert (kept == total).all()
    files = [path for path in folder.rglob("*") if path.is_file() and "clients" not in path.parts]
    for own in plain.values():
        assert not [path for path in files if own[:100].tobytes() in path.read_bytes()]


# -- lost sites


def failed(message: Message) -> Message:
    return Message(to_records(status={"status": "failed"}), reply_to=message)


def lost_in(*stages: str) -> Callable[[Message, Context, Answer], Message]:
    """A site that fails in the k-th stage in round k, and in the later stages of that round."""
    begun = 0

    def answered(message: Message, context: Context, app: Answer) -> Message:
        nonlocal begun
        kind = message.metadata.message_type
        begun += kind == STAGES[0]
        stage = stages[begun - 1] if kind in STAGES and 0 < begun <= len(stages) else ""
        lost = stage and STAGES.index(kind) >= STAGES.index(stage)
        return failed(message) if lost else app(message, context)

    return answered


def test_a_site_may_be_lost_in_any_stage(setting: Setting) -> None:
    """In round k, a site is lost in stage k, after which it is back."""
    grid = masked_grid(setting, {**MASKED, "training.rounds": 5})
    grid.stand_in[next(iter(grid.nodes))] = lost_in(*STAGES)
    found = metrics(setting.coordinate(grid))
    assert [found[round, None, "clients"] for round in range(1, 6)] == [2, 2, 2, 3, 3]
    assert [found[round, None, "left_out"] for round in range(1, 6)] == [1, 1, 1, 0, 0]


@pytest.mark.slow
def test_a_round_with_too_few_sites_is_repeated(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    grid = masked_grid(setting)
    for node in list(grid.nodes)[:2]:
        grid.stand_in[node] = lost_in("train.masked")
    folder = setting.coordinate(grid)
    assert "1 sites sent masked integers; the threshold is 2" in capsys.readouterr().out
    assert [kind for client, kind in grid.asked if client == "hospital-c"].count("train.masked") == 3
    assert metrics(folder)[1, None, "clients"] == 3


def test_shares_are_asked_for_again_and_no_site_trains_again(setting: Setting) -> None:
    """Sites that are lost while they reveal are asked again for the same sum."""
    right = setting.coordinate(masked_grid(setting), "right")
    grid, refused = masked_grid(setting), Counter[int]()
    for node in list(grid.nodes)[:2]:

        def answered(message: Message, context: Context, app: Answer, node: int = node) -> Message:
            if message.metadata.message_type == "query.reveal" and refused[node] < 2:
                refused[node] += 1
                return failed(message)
            return app(message, context)

        grid.stand_in[node] = answered
    found = setting.coordinate(grid)
    assert_same_bits(right, found)
    assert Counter(kind for _, kind in grid.asked)["train.masked"] == 6


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("train.masked", marks=pytest.mark.slow),
        pytest.param("query.confirm", marks=pytest.mark.slow),
        "query.reveal",
    ],
)
def test_a_stopped_run_goes_on_without_a_second_sum(setting: Setting, stage: str) -> None:
    """The coordinator dies in round 2, after some sites have answered. Once shares were asked for, the
    model is that of a run that was not stopped, to the bit."""
    right = setting.coordinate(masked_grid(setting), "right")
    grid, asked = masked_grid(setting), 0

    def dying(message: Message, context: Context, app: Answer) -> Message:
        nonlocal asked
        asked += message.metadata.message_type == stage
        if asked == 2:
            raise Dies
        return app(message, context)

    grid.stand_in[list(grid.nodes)[-1]] = dying
    with pytest.raises(Dies):
        setting.coordinate(grid)
    grid.stand_in.clear()
    grid.asked.clear()
    found = setting.coordinate(grid, resume=True)
    trained = Counter(kind for _, kind in grid.asked)["train.masked"]
    if stage == "query.reveal":
        assert_same_bits(right, found)
        assert trained == 0
    else:
        assert trained == 3
    assert metrics(found)[2, None, "clients"] == 3


class Dies(Exception):
    """The coordinator's process ends."""


@pytest.mark.slow
def test_a_run_that_is_stopped_after_its_sum_asks_no_site_again(setting: Setting) -> None:
    right = setting.coordinate(masked_grid(setting), "right")
    grid = masked_grid(setting)
    with pytest.MonkeyPatch.context() as patch:
        aggregate, rounds = Server.aggregate, 0

        def dying(server: Server, *arguments: Any) -> Any:
            nonlocal rounds
            rounds += 1
            if rounds == 2:
                raise Dies
            return aggregate(server, *arguments)

        patch.setattr(Server, "aggregate", dying)
        with pytest.raises(Dies):
            setting.coordinate(grid)
    grid.asked.clear()
    assert_same_bits(right, setting.coordinate(grid, resume=True))
    assert not {kind for _, kind in grid.asked} & set(STAGES)


# -- sites and coordinators that break the rules


@pytest.mark.slow
def test_a_site_that_reveals_wrong_shares_is_named_and_the_sum_is_right(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    right = setting.coordinate(masked_grid(setting), "right")
    grid = masked_grid(setting)

    def lying(message: Message, context: Context, app: Answer) -> Message:
        reply = app(message, context)
        if message.metadata.message_type != "query.reveal":
            return reply
        found = loaded(Revealed, reply.content["tensors"]["file"].data)
        false = {client: bytes(len(share)) for client, share in found.seeds.items()}
        data = dumped(replace(found, seeds=false))
        return Message(to_records(Payload(data, {}), status={"status": "done"}), reply_to=message)

    grid.stand_in[next(iter(grid.nodes))] = lying
    found = setting.coordinate(grid)
    assert_same_bits(right, found)
    assert "client hospital-a: it reveals a share of" in capsys.readouterr().out
    assert metrics(found)[1, None, "refused"] == 1


def test_a_site_that_shares_another_secret_stops_the_run_and_is_named(setting: Setting) -> None:
    grid = masked_grid(setting)

    def lying(message: Message, context: Context, app: Answer) -> Message:
        if message.metadata.message_type == "query.share":  # between its advertisement and its shares
            (state,) = Path(context.node_config["state"]).rglob("state.json")
            advertised = loaded(Advertised, state.read_bytes())
            state.write_bytes(dumped(replace(advertised, seed=bytes(32))))
        return app(message, context)

    grid.stand_in[next(iter(grid.nodes))] = lying
    with pytest.raises(FederationStoppedError, match="client hospital-a: the shares that it made"):
        setting.coordinate(grid)


def test_a_coordinator_that_plays_a_site_gets_no_upload(setting: Setting) -> None:
    """It registers a key of its own as that of hospital-b; the other sites know the right one."""
    grid = masked_grid(setting, {**MASKED, "training.rounds": 1})
    false = setting.root / "false"
    write_node_key(false / "hospital-b.key")
    for site in SITES:
        if site != "hospital-b":
            shutil.copy(setting.root / "keys" / f"{site}.key.pub", false)
    trusted_sites(false).write(false / "sites.toml")
    (node,) = (node for node, values in grid.nodes.items() if values["client-id"] == "hospital-b")
    grid.nodes[node] |= {"key": str(false / "hospital-b.key"), "sites": str(false / "sites.toml")}
    grid.keys[node] = (false / "hospital-b.key.pub").read_bytes()
    with pytest.raises(FederationStoppedError, match="there is no sum of enough sites"):
        setting.coordinate(grid)
    assert "train.masked" not in {kind for _, kind in grid.asked}


def test_a_site_agrees_to_no_smaller_threshold_than_its_own(setting: Setting) -> None:
    grid = masked_grid(setting, {**MASKED, "training.rounds": 1})
    trusted_sites(setting.root / "keys", 3).write(setting.root / "sites.toml")
    with pytest.raises(FederationStoppedError, match="there is no sum of enough sites"):
        setting.coordinate(grid)
    trusted_sites(setting.root / "keys").write(setting.root / "sites.toml")


def a_site(setting: Setting, overrides: Mapping[str, Any], **node: str) -> Site:
    grid = masked_grid(setting, overrides)
    values = {**next(iter(grid.nodes.values())), **node}
    return Site.at(
        read(grid.config), {key: value for key, value in values.items() if value}, setting.preparation
    )


def test_a_site_that_masks_sends_no_plain_upload_and_no_metric(setting: Setting) -> None:
    site, message = a_site(setting, MASKED), RoundMessage(experiment="0" * 32, round=0)
    for ask in (site.train, site.validate):
        with pytest.raises(SiteError, match=r"privacy\.secure_aggregation = true"):
            ask(message, Callback())
    with pytest.raises(SiteError, match="this site masks its uploads"):
        a_site(setting, unmasked(MASKED))


def test_a_site_needs_its_key_and_those_of_all_others(setting: Setting) -> None:
    for key in ("key", "sites"):
        with pytest.raises(SiteError, match=f"{key} is missing"):
            a_site(setting, MASKED, **{key: ""})
    other = str(setting.root / "keys" / "hospital-b.key")
    with pytest.raises(SiteError, match=r"has the fingerprint SHA256:.* for hospital-a"):
        a_site(setting, MASKED, key=other)
    with pytest.raises(SiteError, match="has no fingerprint of hospital-d, a client of this federation"):
        assert a_site(setting, MASKED).secure.check(["hospital-a", "hospital-d"])


def test_numbers_that_are_cut_are_counted_and_named(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = setting.coordinate(
        masked_grid(setting, {**MASKED, "privacy.mask_range": 0.01, "training.rounds": 1})
    )
    assert metrics(folder)[1, None, "numbers_cut"] > 100
    assert "were above privacy.mask_range = 0.01 and were cut to it; set it higher" in capsys.readouterr().out
