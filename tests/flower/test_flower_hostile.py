"""Hostile sites in this process: nothing that they send is believed, and nothing of it ends the run."""

import json
import math
import pickle
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from machines import SITES

pytest.importorskip("flwr")
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message
from safetensors.torch import load_file
from test_flower_engine import Answer, DirectGrid, Setting, metrics
from test_flower_engine import setting as setting

from fedsmoothlora.errors import DisagreementError, FederationStoppedError
from fedsmoothlora.flower.keys import write_node_key
from fedsmoothlora.flower.records import to_records
from fedsmoothlora.secure_aggregation.identities import fingerprint

safetensors_numpy = pytest.importorskip("safetensors.numpy")

Change = Callable[[dict[str, Any], dict[str, np.ndarray[Any, Any]]], None]


class KilledError(BaseException):
    """The coordinator is killed at this place."""


def inflated(data: bytes) -> dict[str, np.ndarray[Any, Any]]:
    end = 8 + int.from_bytes(data[:8], "little")
    table = zlib.decompress(data[8:end])
    loaded: dict[str, np.ndarray[Any, Any]] = safetensors_numpy.load(
        len(table).to_bytes(8, "little") + table + data[end:]
    )
    return loaded


def deflated(tensors: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    file = safetensors_numpy.save(dict(tensors))
    end = 8 + int.from_bytes(file[:8], "little")
    table = zlib.compress(file[8:end])
    return len(table).to_bytes(8, "little") + table + file[end:]


def first_factor(tensors: Mapping[str, Any]) -> str:
    return next(name for name in tensors if name.endswith("/B"))


def scaled(factor: float) -> Change:
    def change(fields: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        tensors[first_factor(tensors)] *= np.float32(factor)

    return change


def doubled(fields: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    name = first_factor(tensors)
    tensors[name] = np.concatenate([tensors[name]] * 2)


def a_layer_too_many(fields: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    factor = tensors[first_factor(tensors)]
    tensors["sent:images\n/B"], tensors["sent:images\n/A"] = factor, factor.T.copy()


def fields_of(**values: Any) -> Change:
    return lambda fields, tensors: fields.update(values)


def an_old_round(fields: dict[str, Any], tensors: object) -> None:
    fields["round"] -= 1


def many_metrics(fields: dict[str, Any], tensors: object) -> None:
    fields |= {f"metrics:m{number}": 1.0 for number in range(2000)}


# By the lie: the change of the reply, and the reason. A site that lies about metrics alone loses
# these metrics, not its upload.
REFUSED: dict[str, tuple[Change, str]] = {
    "not a number": (scaled(math.nan), "values are not finite"),
    "a giant": (scaled(1e6), "the norm of its upload"),
    "another shape": (doubled, "expected a low-rank product"),
    "a layer too many": (a_layer_too_many, r"unknown layer images\n"),
    "another's name": (fields_of(client="hospital-a"), "it names client 'hospital-a'"),
    "another's name, in red": (fields_of(client="\x1b[31mroot\n"), r"it names client '\x1b[31mroot\n'"),
    "an old round": (an_old_round, "its reply is for round"),
    "no samples": (fields_of(samples=0), "its number of training samples is 0"),
    "a thousand million samples": (fields_of(samples=10**9), "its number of training samples is 1000000000"),
    "a new field": (fields_of(**{"run\nthis": "x" * 8_000_000}), r"an unknown field 'run\nthis'"),
    "text for a number": (fields_of(samples="\n" * 8_000_000), "its samples is '"),
    "thousands of metrics": (many_metrics, "fields; there may be 1000"),
}
DROPPED: dict[str, tuple[dict[str, float], str]] = {
    "no training loss": ({"metrics:train_loss": math.nan}, "train_loss = nan is not between"),
    "a huge loss": ({"metrics:train_loss": 1.7e308}, "train_loss = 1.7e+308 is not between"),
    "an accuracy of a million": ({"metrics:accuracy": 1e6}, "accuracy = 1e+06 is not between 0 and 1"),
    "a name with a line break": ({"metrics:a\nb": 1.0}, "a metric whose name is not valid"),
}


def lying(change: Change) -> Callable[[Message, Context, Answer], Message]:
    """A site that changes the reply of an honest one."""

    def answer(message: Message, context: Context, app: Answer) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "train":
            fields = dict(reply.content["fields"])
            tensors = inflated(reply.content["tensors"]["file"].data)
            change(fields, tensors)
            data = deflated(tensors)
            reply.content["fields"] = ConfigRecord(fields)
            reply.content["tensors"] = file_of(data)
        return reply

    return answer


def file_of(data: bytes) -> ArrayRecord:
    return ArrayRecord({"file": Array("uint8", (len(data),), "safetensors", data)})


def a_pickle(message: Message, context: Context, app: Answer) -> Message:
    reply = app(message, context)
    if message.metadata.message_type == "train":
        reply.content["tensors"] = file_of(pickle.dumps({"q": 1}))
    return reply


def log_of(folder: Path) -> list[str]:
    return (folder / "run.log").read_text(encoding="utf-8").split("\n")


def assert_harmless(folder: Path) -> None:
    """Every line of the log about a client is short and printable, and every recorded number is finite."""
    lines = [line for line in log_of(folder) if "hospital" in line]
    assert any("hospital-c" in line for line in lines)
    for line in lines:
        assert line.isprintable()
        assert len(line) < 2000
    assert all(map(math.isfinite, metrics(folder).values()))
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(r"[\w.@/-]+", json.loads(line)["name"])


@pytest.mark.slow
def test_a_run_with_a_lying_site_is_killed_and_resumed_and_ends_as_one_without_the_site(
    setting: Setting,
) -> None:
    """One lie in each round; the site's honest upload is never among the accepted ones."""
    lies = [*REFUSED.items(), ("a pickle", (None, "no safetensors file"))]
    overrides = {"training.rounds": len(lies), "training.steps": 1}
    kill = True

    def hostile(message: Message, context: Context, app: Answer) -> Message | None:
        nonlocal kill
        if message.metadata.message_type != "train":
            return app(message, context)
        round = message.content["fields"]["round"]
        if round == 2 and kill:
            kill = False
            raise KilledError
        change = lies[round][1][0]
        return a_pickle(message, context, app) if change is None else lying(change)(message, context, app)

    grid = setting.grid(overrides)
    grid.stand_in[12] = hostile
    with pytest.raises(KilledError):
        setting.coordinate(grid)
    found = setting.coordinate(grid, resume=True)
    assert_harmless(found)
    log = log_of(found)
    for round, (lie, (_, reason)) in enumerate(lies, 1):
        start = f"round {round}: upload refused: client hospital-c"
        assert any(start in line and reason in line for line in log), lie
        assert (round, "hospital-c", "samples") not in metrics(found)

    def failing(message: Message, context: Context, app: Answer) -> Message:
        if message.metadata.message_type != "train":
            return app(message, context)
        return Message(to_records(status={"status": "failed"}), reply_to=message)

    grid = setting.grid(overrides)
    grid.stand_in[12] = failing
    honest = setting.coordinate(grid, "honest")
    right, got = (load_file(path / "model" / "model.safetensors") for path in (honest, found))
    assert right.keys() == got.keys()
    assert all(torch.equal(value, got[name]) for name, value in right.items())


def test_lies_about_metrics_are_dropped_with_a_reason_and_the_upload_counts(setting: Setting) -> None:
    lies = list(DROPPED.values())
    overrides = {"training.rounds": len(lies), "training.steps": 1}
    grid = setting.grid(overrides)

    def hostile(message: Message, context: Context, app: Answer) -> Message:
        if message.metadata.message_type != "train":
            return app(message, context)
        values, _ = lies[message.content["fields"]["round"]]
        return lying(fields_of(**values))(message, context, app)

    grid.stand_in[12] = hostile
    found = setting.coordinate(grid)
    assert_harmless(found)
    log = log_of(found)
    for round, (_, reason) in enumerate(lies, 1):
        assert any(f"round {round}: client hospital-c: metrics" in line and reason in line for line in log)
        assert metrics(found)[round, None, "clients"] == 3
    assert (1, "hospital-c", "train_loss") not in metrics(found)
    assert math.isfinite(metrics(found)[1, None, "train_loss"])


def test_a_reply_without_any_metrics_does_not_end_the_run(setting: Setting) -> None:
    grid = setting.grid({"training.rounds": 1, "training.steps": 1})

    def without(fields: dict[str, Any], tensors: object) -> None:
        for name in [name for name in fields if name.startswith("metrics:")]:
            del fields[name]

    for node in grid.nodes:
        grid.stand_in[node] = lying(without)
    found = metrics(setting.coordinate(grid))
    assert found[1, None, "clients"] == 3
    assert (1, None, "train_loss") not in found


def validation_answers(
    setting: Setting, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[Path, dict[tuple[int, str | None, str], float]]:
    """A round whose validation answers of hospital-c are changed."""
    del setting.table["data"]["test"]
    grid = setting.grid({"training.rounds": 1, "training.steps": 1, "data.validation": 0.2})

    def hostile(message: Message, context: Context, app: Answer) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "evaluate":
            reply.content["metrics"] = ConfigRecord(change(dict(reply.content["metrics"])))
        return reply

    grid.stand_in[12] = hostile
    folder = setting.coordinate(grid)
    return folder, metrics(folder)


def mean_of_honest(setting: Setting, found: Mapping[tuple[int, str | None, str], float], name: str) -> float:
    """The mean over hospital-a and hospital-b, whose validation sets have a fifth of their rows."""
    weights = {client: round(0.2 * SITES[client]) for client in ("hospital-a", "hospital-b")}
    return sum(found[1, client, name] * rows for client, rows in weights.items()) / sum(weights.values())


def test_a_validation_metric_out_of_range_is_dropped_for_that_client_only(setting: Setting) -> None:
    folder, found = validation_answers(setting, lambda metrics: {**metrics, "accuracy": 1e6})
    assert_harmless(folder)
    assert any("accuracy = 1e+06 is not between 0 and 1" in line for line in log_of(folder))
    assert (1, "hospital-c", "accuracy") not in found
    assert (1, "hospital-c", "loss") in found
    assert found[1, None, "accuracy"] == pytest.approx(mean_of_honest(setting, found, "accuracy"), abs=0.02)


def test_a_validation_answer_without_a_name_that_the_others_have_is_missing_for_that_client_only(
    setting: Setting,
) -> None:
    _, found = validation_answers(setting, lambda metrics: {"loss": metrics["loss"]})
    assert (1, "hospital-c", "accuracy") not in found
    assert found[1, None, "accuracy"] == pytest.approx(mean_of_honest(setting, found, "accuracy"), abs=0.02)


def test_a_validation_answer_of_text_is_left_out(setting: Setting) -> None:
    folder, found = validation_answers(setting, lambda metrics: {"\x1b[2J": "\n" * 1000, "loss": "low"})
    assert_harmless(folder)
    assert not any(client == "hospital-c" and name in ("loss", "accuracy") for _, client, name in found)


# -- identity ----------------------------------------------------------------------------------------


def bound(setting: Setting, folder: Path, nodes: Mapping[int, str]) -> DirectGrid:
    """A grid whose nodes have keys, ``nodes`` says of which client; ids are bound to these keys."""
    keys = {client: write_node_key(folder / f"{client}.key").read_bytes() for client in (*SITES, "mallory")}
    setting.table["flower"]["nodes"] = {client: fingerprint(keys[client]) for client in SITES}
    grid = setting.grid({"training.rounds": 1, "training.steps": 1})
    grid.keys = {node: keys[client] for node, client in nodes.items()}
    return grid


def test_a_node_with_another_key_is_refused_by_name_and_the_run_goes_on(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = bound(setting, tmp_path, {9: "mallory", 10: "hospital-a", 11: "hospital-b", 12: "hospital-c"})
    grid.nodes = {9: {**grid.nodes[10]}, **grid.nodes}  # it comes first, and claims to be hospital-a
    found = metrics(setting.coordinate(grid))
    assert found[1, None, "clients"] == 3
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"node 9 is refused: its key SHA256:\S{43} is that of no client", said)
    assert "not bound to keys" not in said
    assert [client for client, kind in grid.asked if kind == "query.agree"] == list(SITES)


def test_a_client_that_claims_another_s_id_is_refused_by_name(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = bound(setting, tmp_path, {10: "hospital-b", 11: "hospital-a", 12: "hospital-c"})

    with pytest.raises(DisagreementError, match="there is no hospital-a, hospital-b"):
        setting.coordinate(grid)
    said = " ".join(capsys.readouterr().out.split())
    assert "node 10 is refused: it claims to be hospital-a, and its key is that of hospital-b" in said
    assert "node 11 is refused: it claims to be hospital-b, and its key is that of hospital-a" in said


def test_without_a_table_of_keys_the_coordinator_says_so(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    del (grid := setting.grid()).nodes[12]
    with pytest.raises(DisagreementError):
        setting.coordinate(grid)
    assert "client ids are not bound to keys (flower.nodes)" in " ".join(capsys.readouterr().out.split())


def test_the_id_of_a_message_cannot_be_guessed(setting: Setting) -> None:
    """Flower's ids are hashes of messages, so two equal messages to one node must differ."""
    secrets = []

    def seen(message: Message, context: Context, app: Answer) -> Message:
        secrets.append(message.content["secret"]["secret"])
        return app(message, context)

    grid = setting.grid({"training.rounds": 1, "training.steps": 1})
    grid.stand_in[12] = seen
    setting.coordinate(grid)
    assert len(set(secrets)) == len(secrets) == 2
    assert all(re.fullmatch(r"[0-9a-f]{64}", str(secret)) for secret in secrets)


def test_a_run_without_any_metric_of_the_global_model_stops_with_the_reason(setting: Setting) -> None:
    del setting.table["data"]["test"]
    grid = setting.grid({"training.rounds": 1, "training.steps": 1, "data.validation": 0.2})

    def hostile(message: Message, context: Context, app: Answer) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "evaluate":
            reply.content["metrics"] = ConfigRecord({"accuracy": math.nan})
        return reply

    for node in grid.nodes:
        grid.stand_in[node] = hostile
    with pytest.raises(FederationStoppedError, match="no client gave any metrics"):
        setting.coordinate(grid)
