"""Flower's engine with sites in this process: every method, absent and forgetful clients, disagreements."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from machines import SITES, write_table
from rich.console import Console
from safetensors.torch import load_file, save_file

from conftest import CLASSES
from families import OF_A_FAMILY, level
from fedsmoothlora import methods, run
from fedsmoothlora.config import Config, ConfigError, read, to_toml
from fedsmoothlora.config.settings import FlowerSettings
from fedsmoothlora.errors import DisagreementError
from fedsmoothlora.methods.fedsmoothlora import FedSmoothLoRA
from fedsmoothlora.reports.metrics import is_known

pytest.importorskip("flwr")
import httpx
from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError

from fedsmoothlora.errors import SiteError
from fedsmoothlora.flower.client_app import client_app
from fedsmoothlora.flower.coordinator import FlowerEngine
from fedsmoothlora.flower.records import to_records
from fedsmoothlora.flower.server_app import check_for_sites, coordinate
from fedsmoothlora.flower.site import Preparation, Site
from fedsmoothlora.runs.planning import LoadedModel, Plan, load, plan

Overrides = Mapping[str, Any]
Answer = Callable[[Message, Context], Message]


class CachedPreparation(Preparation):
    """Reads the data and loads the model of a configuration once; messages receive copies of the model."""

    def __init__(self) -> None:
        plans: dict[str, Plan] = {}
        models: dict[int, LoadedModel] = {}

        def cached_plan(config: Config, site: str | None) -> Plan:
            key = f"{site}\n{to_toml(config)}"
            if key not in plans:
                plans[key] = plan(config, site=site)
            return plans[key]

        def copied_model(planned: Plan) -> LoadedModel:
            if id(planned) not in models:
                models[id(planned)] = load(planned)
            loaded = models[id(planned)]
            return replace(loaded, adapted=deepcopy(loaded.adapted))

        super().__init__(plan=cached_plan, load=copied_model)


class DirectGrid(Grid):
    """Nodes in this process: a message is answered when it is sent. Replies come in the reverse order."""

    def __init__(
        self, config: Path, nodes: Mapping[int, dict[str, Any]], preparation: Preparation | None = None
    ) -> None:
        self.config = config
        self.nodes = dict(nodes)
        self.keys: dict[int, bytes] = {}
        self.preparation = preparation
        self.stand_in: dict[int, Callable[[Message, Context, Answer], Message | None]] = {}
        self.answered: dict[str, Message] = {}
        self.asked: list[tuple[str, str]] = []
        self.sent = Counter[str]()  # bytes of tensors, by the kind of message

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=node, public_key=self.keys.get(node, b"")) for node in self.nodes]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        identities = []
        for message in messages:
            identity = f"message-{len(self.asked)}"
            message.metadata.__dict__["_message_id"] = identity
            node = message.metadata.dst_node_id
            context = Context(1, node, self.nodes[node], RecordDict(), {})
            self.asked.append((self.nodes[node].get("client-id", "?"), message.metadata.message_type))
            if "tensors" in message.content.array_records:
                data = message.content["tensors"]["file"].data
                header = 8 + int.from_bytes(data[:8], "little")  # its deflated table
                self.sent[message.metadata.message_type] += len(data) - header
            app = client_app(self.config, self.preparation)
            stand_in = self.stand_in.get(node)
            reply = app(message, context) if stand_in is None else stand_in(message, context, app)
            if reply is not None:
                self.answered[identity] = reply
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.answered.pop(identity) for identity in message_ids if identity in self.answered]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError


class Setting:
    """Three sites with files of their own, and what runs of them came to."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root = root
        self.preparation = CachedPreparation()
        for seed, (site, rows) in enumerate(SITES.items(), 1):
            write_table(root / "data" / f"{site}.csv", rows, seed)
        write_table(root / "test" / "test.csv", 64, 9)
        self.table: dict[str, Any] = {
            "name": "textures",
            "model": {"source": str(model), "image_size": 28},
            "lora": {"r": 2, "alpha": 4, "dropout": 0.1},
            "data": {
                "source": str(root / "data"),
                "classes": list(CLASSES),
                "test": str(root / "test/test.csv"),
            },
            "partition": {"kind": "by_file"},
            "method": {"name": "fedsmoothlora", "gamma": 64, "calibration_batches": 2},
            "training": {"rounds": 3, "batch_size": 8, "lr": 0.02},
            "flower": {"clients": list(SITES), "timeout": 1.0, "wait": 2.0, "warm": False},
            "machine": {"threads": 1, "device": "cpu"},
        }

    def grid(self, overrides: Overrides | None = None) -> DirectGrid:
        """A grid whose sites have the configuration with ``overrides``."""
        file = self.root / "config.toml"
        file.write_text(to_toml(read(self.table, overrides)), encoding="utf-8")
        state = self.root / "state"
        shutil.rmtree(state, ignore_errors=True)
        return DirectGrid(
            file,
            {
                10 + place: {
                    "client-id": site,
                    "data": str(self.root / "data" / f"{site}.csv"),
                    "state": str(state / site),
                }
                for place, site in enumerate(SITES)
            },
            self.preparation,
        )

    def coordinate(self, grid: DirectGrid, name: str = "flower", resume: bool = False) -> Path:
        folder = self.root / name
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        where = {"out": None, "resume": None, "resume" if resume else "out": str(folder)}
        coordinate(grid, read(grid.config), **where)
        return folder

    def in_process(self, overrides: Overrides | None = None) -> Path:
        folder = self.root / "in-process"
        shutil.rmtree(folder, ignore_errors=True)
        return run(read(self.table, overrides), out=folder, console=Console(quiet=True)).folder


@pytest.fixture
def setting(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    for name in ("_run_id", "_node_id", "_task_id"):  # what Flower's processes set before an app begins
        monkeypatch.setattr(TaskIdentity, name, 1)
    return Setting(tmp_path, tiny_folder)


def metrics(folder: Path) -> dict[tuple[int, str | None, str], float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {
        (line["round"], line["client"], line["name"]): line["value"]
        for line in lines
        if not line["name"].startswith("seconds")
    }


def assert_same(one: Path, other: Path, but: tuple[str, ...] = ()) -> None:
    """Weights within 1e-5, and the same metrics."""
    assert (one / "model").exists() == (other / "model").exists()
    if (one / "model").exists():
        right, found = (load_file(path / "model" / "model.safetensors") for path in (one, other))
        for name, value in right.items():
            assert float((value - found[name]).norm()) <= 1e-5 * float(value.norm()), name
    expected, got = metrics(one), metrics(other)
    assert {key for key in got if key[2] != "bytes_down_validation"} == expected.keys()
    for key, value in expected.items():
        if key[2] not in but:
            assert got[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


QUICK = ("fedsmoothlora", "fedit", "full")


CODED = [m for m in methods.names() if not methods.find(m).traits.float32_reason]


@pytest.mark.parametrize(
    "method",
    # One federation for each family: with coded factors where the family's method can have them.
    [pytest.param(m, marks=level(m, QUICK, slow=set(OF_A_FAMILY) - set(CODED))) for m in methods.names()],
)
def test_every_method_trains_what_it_trains_in_one_process(setting: Setting, method: str) -> None:
    overrides: dict[str, Any] = {"training.rounds": 2}
    if method != "fedsmoothlora":
        overrides["method.name"] = method
    if not methods.find(method).traits.global_model:
        overrides["data.validation"] = 0.2
        del setting.table["data"]["test"]
    found = setting.coordinate(setting.grid(overrides))
    # What validating brings to clients need not be sent again.
    assert_same(
        setting.in_process(overrides), found, but=("bytes_down",) if "data.validation" in overrides else ()
    )


def test_sites_draw_the_sketches_that_are_drawn_in_one_process(setting: Setting) -> None:
    overrides = {"training.rounds": 2, "method.gradient": "sketch", "method.sketch_width": 3}
    assert_same(setting.in_process(overrides), setting.coordinate(setting.grid(overrides)))


@pytest.mark.parametrize("method", [pytest.param(m, marks=level(m, QUICK, slow=OF_A_FAMILY)) for m in CODED])
def test_coded_factors_train_what_they_train_in_one_process(setting: Setting, method: str) -> None:
    """Clients that miss rounds, and validation at the sites, which are sent the whole model."""
    overrides = {"training.rounds": 3, "participation.clients": 2, "transport.bits": 16}
    overrides |= {} if method == "fedsmoothlora" else {"method.name": method}
    if method == "fedsa":
        overrides["data.validation"] = 0.2
        del setting.table["data"]["test"]
    grid = setting.grid(overrides)
    found = setting.coordinate(grid)
    one = setting.in_process(overrides)
    assert_same(one, found, but=("bytes_down",) if "data.validation" in overrides else ())
    down = sum(value for key, value in metrics(found).items() if key[1:] == (None, "bytes_down"))
    assert grid.sent["train"] == down
    updates = [load_file(path) for path in sorted((found / "updates").iterdir())]
    there = [load_file(path) for path in sorted((one / "updates").iterdir())]
    for mine, theirs in zip(updates, there, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(value.dtype == torch.bfloat16 for value in mine.values())


PACKED = {"transport.bits": 4}
OF_OUR_OWN = {**PACKED, "method.zeta": 0.0, "method.server_feedback": True, "method.client_feedback": True}


@pytest.mark.parametrize(
    "chosen",
    [
        {"transport.bits": 16},
        OF_OUR_OWN,
        pytest.param(
            {
                **OF_OUR_OWN,
                "method.layer_ranks": "energy",
                "method.calibration_step": True,
                "participation.clients": 2,
            },
            marks=pytest.mark.slow,
            id="layer_ranks-4",
        ),
        pytest.param({**PACKED, "method.name": "fedit"}, marks=pytest.mark.slow),
        pytest.param({**PACKED, "method.name": "rolora", "participation.clients": 2}, marks=pytest.mark.slow),
        pytest.param({**PACKED, "method.name": "flexlora"}, marks=pytest.mark.release),
    ],
    ids=lambda chosen: f"{chosen.get('method.name', 'fedsmoothlora')}-{chosen['transport.bits']}",
)
def test_coded_factors_give_the_same_bits_at_sites_as_in_one_process(
    setting: Setting, chosen: dict[str, Any]
) -> None:
    """Every message reads the data and loads the model from disk, as at a site."""
    overrides = {"training.rounds": 3, **chosen}
    grid = setting.grid(overrides)
    grid.preparation = None
    found = setting.coordinate(grid)
    one = setting.in_process(overrides)
    for folder in ("updates", "model"):
        for path in sorted((one / folder).glob("*.safetensors")):
            right, got = load_file(path), load_file(found / folder / path.name)
            assert right.keys() == got.keys()
            assert all(torch.equal(value, got[name]) for name, value in right.items())


SUBSPACE = {"method.exchange": "subspace", "method.zeta": 0.0}


def test_sites_upload_twice_through_a_shared_subspace(setting: Setting) -> None:
    """With clients that miss rounds; all data and state are read from disk for every message."""
    overrides = {**SUBSPACE, "training.rounds": 3, "participation.clients": 2}
    grid = setting.grid(overrides)
    grid.preparation = None
    found, one = setting.coordinate(grid), setting.in_process(overrides)
    assert_same(one, found)
    for path in sorted((one / "updates").glob("*.safetensors")):
        right, got = load_file(path), load_file(found / "updates" / path.name)
        assert right.keys() == got.keys()
        assert all(torch.equal(value, got[name]) for name, value in right.items())
    assert [kind for _, kind in grid.asked].count("train") == 3 * 2 * 2
    down = sum(value for key, value in metrics(found).items() if key[1:] == (None, "bytes_down"))
    assert grid.sent["train"] == down


@pytest.mark.slow
def test_sites_that_validate_hold_the_shared_subspace(setting: Setting) -> None:
    del setting.table["data"]["test"]
    overrides = {**SUBSPACE, "data.validation": 0.2, "participation.clients": 2, "training.rounds": 4}
    found = setting.coordinate(setting.grid(overrides))
    assert_same(setting.in_process(overrides), found, but=("bytes_down",))


@pytest.mark.slow
@pytest.mark.parametrize("round", [1, 2])
def test_a_site_that_lost_its_part_of_an_update_is_sent_all_of_it(setting: Setting, round: int) -> None:
    grid = setting.grid(SUBSPACE)

    def forget(message: Message, context: Context, app: Answer) -> Message:
        fields = message.content["fields"] if message.metadata.message_type == "train" else {}
        if fields.get("round") == round and not fields.get("exchange"):
            shutil.rmtree(setting.root / "state" / "hospital-b", ignore_errors=True)
        return app(message, context)

    grid.stand_in[11] = forget
    folder = setting.coordinate(grid)
    log = (folder / "run.log").read_text(encoding="utf-8")
    assert "client hospital-b lost its state: it is sent all server updates again" in log
    assert [metrics(folder)[t, None, "clients"] for t in (1, 2, 3)] == [3, 3, 3]


@pytest.mark.slow
def test_a_site_that_is_lost_between_the_exchanges_is_left_out(setting: Setting) -> None:
    grid = setting.grid(SUBSPACE)

    def silent(message: Message, context: Context, app: Answer) -> Message | None:
        fields = message.content["fields"] if message.metadata.message_type == "train" else {}
        return None if (fields.get("round"), fields.get("exchange")) == (1, 1) else app(message, context)

    grid.stand_in[11] = silent
    folder = setting.coordinate(grid)
    assert [metrics(folder)[t, None, "clients"] for t in (1, 2, 3)] == [3, 2, 3]
    assert metrics(folder)[2, None, "left_out"] == 1


def test_validation_rows_stay_at_sites_and_give_the_same_figures(setting: Setting) -> None:
    del setting.table["data"]["test"]
    overrides = {"data.validation": 0.2, "evaluation.clients": True, "participation.clients": 2}
    grid = setting.grid(overrides)
    found = setting.coordinate(grid)
    one = setting.in_process(overrides)
    assert_same(one, found, but=("bytes_down",))

    def total(folder: Path, name: str) -> float:
        return sum(value for key, value in metrics(folder).items() if key[1:] == (None, name))

    assert grid.sent["train"] == total(found, "bytes_down") < total(one, "bytes_down")
    assert grid.sent["evaluate"] == total(found, "bytes_down_validation") > 0
    lines = (found / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    written = {json.loads(line)["name"] for line in lines}
    assert sorted(name for name in written if not is_known(name)) == []
    assert {"bytes_down_validation", "seconds_loading"} <= written


@pytest.mark.parametrize(
    "chosen",
    [
        {"method.name": "fedit", "participation.clients": 2},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"method.name": "fedit", **PACKED}, marks=pytest.mark.slow),
    ],
    ids=["fedit", "fedsmoothlora", "fedit-4"],
)
def test_personal_models_stay_at_sites_and_give_the_same_figures(
    setting: Setting, chosen: dict[str, Any]
) -> None:
    overrides = {
        **{"training.rounds": 2, "data.validation": 0.2, **chosen},
        **{"personal.ditto": 0.1, "evaluation.personal_steps": 2},
    }
    grid = setting.grid(overrides)
    found = setting.coordinate(grid)
    assert_same(setting.in_process(overrides), found, but=("bytes_down", "bytes_down_personal"))
    final = metrics(found)
    for client in SITES:
        assert {(2, client, f"{kind}_accuracy") for kind in ("personal", "tuned")} <= final.keys()
    assert (
        final[2, None, "personal_accuracy_worst_tenth"]
        <= final[2, None, "personal_accuracy_mean_over_clients"]
    )


@pytest.mark.slow
def test_a_site_cannot_replace_other_metrics_with_those_of_its_personal_models(setting: Setting) -> None:
    grid = setting.grid({"training.rounds": 1, "data.validation": 0.2, "personal.ditto": 0.1})

    def more(message: Message, context: Context, app: Answer) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "evaluate" and message.content["fields"]["personal"]:
            reply.content["metrics"]["accuracy"] = 1.0
            reply.content["metrics"]["personal_accuracy"] = 7.0
        return reply

    grid.stand_in[11] = more
    folder = setting.coordinate(grid)
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    named = [(line["client"], line["name"]) for line in found if line["round"] == 1]
    assert named.count(("hospital-b", "accuracy")) == 1
    log = (folder / "run.log").read_text(encoding="utf-8")
    assert "metrics of client hospital-b are not used: personal_accuracy = 7 is not between 0 and 1" in log


def test_clients_that_miss_rounds_are_caught_up_by_the_same_bytes(setting: Setting) -> None:
    overrides = {"participation.clients": 2, "training.rounds": 5}
    found = setting.coordinate(setting.grid(overrides))
    assert_same(setting.in_process(overrides), found)


def test_a_site_that_lost_its_state_says_so_and_is_sent_all_again(setting: Setting) -> None:
    grid = setting.grid()

    def forget(message: Message, context: Context, app: Answer) -> Message:
        if message.metadata.message_type == "train" and message.content["fields"]["round"] == 2:
            shutil.rmtree(setting.root / "state" / "hospital-b", ignore_errors=True)
        return app(message, context)

    grid.stand_in[11] = forget
    folder = setting.coordinate(grid)
    log = (folder / "run.log").read_text(encoding="utf-8")
    assert "client hospital-b lost its state: it is sent all server updates again" in log
    found = metrics(folder)
    assert found[3, None, "clients"] == 3
    # Two updates in place of one, beside the message that was in vain; the first rounds are untouched.
    assert found[3, None, "bytes_down"] > metrics(setting.in_process())[3, None, "bytes_down"]


def test_a_node_that_does_not_answer_is_left_out_and_comes_back_under_another_number(
    setting: Setting,
) -> None:
    grid = setting.grid()

    def silent(message: Message, context: Context, app: Answer) -> Message | None:
        if message.metadata.message_type == "train" and message.content["fields"]["round"] == 1:
            grid.nodes[99] = grid.nodes.pop(11)  # started again
            return None
        return app(message, context)

    grid.stand_in[11] = silent
    folder = setting.coordinate(grid)
    log = (folder / "run.log").read_text(encoding="utf-8")
    assert "round 2: no reply of client hospital-b within 1 s (flower.timeout); it is left out" in log
    assert [metrics(folder)[round, None, "clients"] for round in (1, 2, 3)] == [3, 2, 3]


def test_a_failing_site_sends_no_word_of_its_error(setting: Setting) -> None:
    grid = setting.grid()
    replies = []

    def broken(message: Message, context: Context, app: Answer) -> Message:
        if message.metadata.message_type == "train":
            context.node_config["data"] = "/data/patients-of-dr-smith"
        replies.append(app(message, context))
        return replies[-1]

    grid.stand_in[11] = broken
    folder = setting.coordinate(grid)
    assert "client hospital-b failed and is left out; the site's own log says why" in (
        folder / "run.log"
    ).read_text(encoding="utf-8")
    for reply in replies[1:]:
        assert not reply.has_error()
        assert list(reply.content) == ["status"]
        assert dict(reply.content["status"]) == {"status": "failed"}


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_that_was_never_stopped(setting: Setting) -> None:
    grid = setting.grid()
    folder = setting.coordinate(grid)
    whole = folder.rename(setting.root / "whole")
    grid = setting.grid({"training.rounds": 3})

    class KilledError(BaseException):
        pass

    def killed(message: Message, context: Context, app: Answer) -> Message:
        if message.metadata.message_type == "train" and message.content["fields"]["round"] == 2:
            raise KilledError
        return app(message, context)

    grid.stand_in[12] = killed
    with pytest.raises(KilledError):
        setting.coordinate(grid)
    grid.stand_in.clear()
    assert_same(whole, setting.coordinate(grid, resume=True))


def test_what_sites_and_coordinator_disagree_on_is_said_with_both_values(
    setting: Setting, tiny_folder: Path, tmp_path: Path
) -> None:
    """hospital-a has another tokenizer, hospital-b other weights, hospital-c another label map."""
    grid = setting.grid()
    for node, name in ((10, "tokenizer"), (11, "weights")):
        shutil.copytree(tiny_folder, tmp_path / name)
        grid.nodes[node]["model"] = str(tmp_path / name)
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    file = tmp_path / "weights" / "model.safetensors"
    tensors = load_file(file)
    tensors[next(iter(tensors))] += 1
    save_file(tensors, file, metadata={"format": "pt"})

    def other_labels(message: Message, context: Context, app: Answer) -> Message:
        reply = app(message, context)
        reply.content["site_info"]["classes"] = ["plain", "rows", "columns", "checks"]
        return reply

    grid.stand_in[12] = other_labels
    with pytest.raises(DisagreementError) as error:
        setting.coordinate(grid)
    assert "the label map of hospital-c is [plain, rows, columns, checks]" in str(error.value)
    assert "the coordinator's is [rows, columns, checks, plain]" in str(error.value)
    assert "the tokenizer (SHA-256) of hospital-a is " in str(error.value)
    assert "the coordinator's is none" in str(error.value)
    assert "the base weights (SHA-256) of hospital-b is " in str(error.value)
    assert not (setting.root / "flower").exists()
    assert {kind for _, kind in grid.asked} == {"query.agree"}


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"client": "hospital-a"}, "it says that it is hospital-a, and so does node 10"),
        ({"client": "hospital-z"}, "it says that it is 'hospital-z', which is not in flower.clients"),
        ({"samples": 0}, r"its samples is 0; it must be an integer from 1 to 2\^53"),
        ({"samples": "many"}, "its samples is of type str"),
        ({"classes": [1, 2]}, "its classes is of type list"),
        ({"rows": [1]}, "its site info has the fields"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_impossible_site_info_is_refused(setting: Setting, facts: dict[str, Any], reason: str) -> None:
    grid = setting.grid()

    def lie(message: Message, context: Context, app: Answer) -> Message:
        reply = app(message, context)
        for key, value in facts.items():
            reply.content["site_info"][key] = value
        return reply

    grid.stand_in[12] = lie
    with pytest.raises(DisagreementError, match=reason):
        setting.coordinate(grid)


def test_a_site_that_cannot_prepare_and_one_that_does_not_come_are_named(setting: Setting) -> None:
    grid = setting.grid()
    grid.nodes[12]["data"] = str(setting.root / "nowhere")
    with pytest.raises(DisagreementError, match="node 12: it cannot prepare its data"):
        setting.coordinate(grid)
    grid = setting.grid()
    del grid.nodes[12]
    with pytest.raises(DisagreementError, match=r"no hospital-c; connected are hospital-a, hospital-b"):
        setting.coordinate(grid)


def test_a_reply_that_is_no_reply_is_refused_and_the_round_goes_on(setting: Setting) -> None:
    grid = setting.grid({"training.rounds": 1})
    grid.stand_in[12] = lambda message, context, app: (
        Message(to_records(status={"status": "done"}), reply_to=message)
        if message.metadata.message_type == "train"
        else app(message, context)
    )
    folder = setting.coordinate(grid)
    log = (folder / "run.log").read_text(encoding="utf-8")
    assert "round 1: upload refused: client hospital-c: it has no tensors" in log
    assert metrics(folder)[1, None, "clients"] == 2


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ({"client": "a"}, "unknown key 'client'"),
        ({"client-id": 1}, "client-id = 1 must be text"),
        ({"data": "/data"}, "client-id is missing"),
        ({"client-id": "hospital-z", "data": "/data"}, "'hospital-z' is not in flower.clients"),
        ({"client-id": "hospital-a"}, "data is missing"),
    ],
)
def test_node_config_is_checked(setting: Setting, node: dict[str, Any], reason: str) -> None:
    with pytest.raises(SiteError, match=reason):
        Site.at(read(setting.table), node)


@pytest.mark.parametrize("nodes", [2, 4])
def test_a_simulation_of_another_size_is_refused_with_the_right_one(setting: Setting, nodes: int) -> None:
    config = read(setting.table, {"flower.clients": []})
    site = Site.at(config, {"partition-id": nodes - 1, "num-partitions": nodes}, setting.preparation)
    with pytest.raises(SiteError, match=f"simulation has {nodes} nodes.*3 clients.*num-supernodes=3'"):
        site.info()


def test_gradients_do_not_leave_sites(setting: Setting) -> None:
    config = read(setting.table)
    shared = FedSmoothLoRA(gradient_aligned="shared")
    with pytest.raises(ConfigError, match="sends calibration gradients"):
        check_for_sites(replace(config, method=shared))


def test_several_clients_at_once_belong_to_the_other_engine(setting: Setting) -> None:
    config = read(setting.table, {"machine.jobs": 2})
    with pytest.raises(ConfigError, match=r"machine\.jobs = 2: with Flower every site is a process"):
        check_for_sites(config)


def test_a_model_is_not_compiled_for_every_message(setting: Setting) -> None:
    config = read(setting.table, {"machine.compile": True, "flower.warm": False})
    with pytest.raises(ConfigError, match=r"machine\.compile = true and flower\.warm = false: every message"):
        check_for_sites(config)
    check_for_sites(read(setting.table, {"machine.compile": True, "flower.warm": True}))


class RaisingGrid(DirectGrid):
    """Flower's decoding of a node's reply raises an error."""

    def __init__(self, error: Exception) -> None:
        super().__init__(Path(), {})
        self.error = error

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        raise self.error


def engine_of(grid: Grid) -> FlowerEngine:
    return FlowerEngine(grid, FlowerSettings(), cast(Any, None), ["0"], units_per_row=1)


@pytest.mark.parametrize(
    "error", [IndexError("chunk"), DecodeError("no protobuf"), AttributeError("x"), RuntimeError("y")]
)
def test_a_node_that_pushes_no_message_does_not_end_the_run(error: Exception) -> None:
    assert list(engine_of(RaisingGrid(error)).replies(["message-0"])) == [("message-0", None)]


@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), ConnectionResetError("reset")])
def test_a_lost_connection_to_the_superlink_is_no_bad_reply(error: Exception) -> None:
    with pytest.raises(type(error)):
        list(engine_of(RaisingGrid(error)).replies(["message-0"]))
