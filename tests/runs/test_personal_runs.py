"""Runs with personal models: resumed to the bit, reported over clients, exported."""

from __future__ import annotations

import io
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fedsmoothlora import Callback, RoundRecord
from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError, InterruptedRunError
from fedsmoothlora.exports.export import export
from fedsmoothlora.exports.run_model import load_run_model, open_run
from fedsmoothlora.exports.trained import client_model, global_model
from fedsmoothlora.federation.engines import in_process
from fedsmoothlora.federation.personal import Deviation
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.session import run
from fedsmoothlora.storage.client_store import StoredStates

PERSONAL = {
    **{"method.name": "fedit", "training.rounds": 3, "training.steps": 2, "data.validation": 0.25},
    **{"participation.clients": 2, "personal.ditto": 0.1, "evaluation.personal_steps": 2},
}


def quiet() -> Console:
    return Console(file=io.StringIO())


def recorded(folder: Path) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line.values()) for line in lines if not line["name"].startswith("seconds")]


def states(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in (folder / "clients").rglob("*.safetensors")
    }


class StopsAfter(Callback):
    def __init__(self, round: int) -> None:
        self.round = round

    def on_round_end(self, record: RoundRecord) -> None:
        if record.round == self.round:
            raise InterruptedRunError("stopped by the test")


@pytest.fixture
def finished(toy_table: dict[str, Any], finished_runs: Any, tmp_path: Path) -> Path:
    """The folder of a run with personal models."""
    folder: Path = finished_runs.copy(toy_table, PERSONAL, tmp_path / "whole")
    return folder


def test_a_resumed_run_has_the_same_personal_models(
    toy_table: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    with pytest.raises(InterruptedRunError):
        run(toy_table, PERSONAL, out=out, console=quiet(), callbacks=[StopsAfter(2)])
    run(resume=out, console=quiet())
    assert recorded(out) == recorded(finished)
    assert states(out) == states(finished)


def test_a_run_that_is_stopped_among_the_personal_models_measures_them_all_when_resumed(
    toy_table: dict[str, Any], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, measured = tmp_path / "stopped", in_process.personal_metrics
    calls: list[str] = []

    def stopping(simulation: Any, client: str, *rest: Any) -> Mapping[str, float]:
        calls.append(client)
        if len(calls) == 2:
            raise InterruptedRunError("stopped by the test")
        return measured(simulation, client, *rest)

    monkeypatch.setattr(in_process, "personal_metrics", stopping)
    with pytest.raises(InterruptedRunError):
        run(toy_table, PERSONAL, out=out, console=quiet())
    run(resume=out, console=quiet())
    assert recorded(out) == recorded(finished)
    assert len(calls) == 2 + 3


def test_the_terminal_and_the_record_have_the_worst_tenth_and_the_spread(
    toy_table: dict[str, Any], tmp_path: Path
) -> None:
    console = quiet()
    result = run(toy_table, PERSONAL, out=tmp_path / "run", console=console)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "accuracy of the global model: mean",
        "personal accuracy: mean",
        "fine-tuned accuracy: mean",
    ):
        assert f"over clients, {words}" in " ".join(told.split())
    frame = result.frame()
    last = frame[(frame["round"] == 3) & frame.client.notna()]
    for name in ("accuracy", "personal_accuracy", "tuned_accuracy"):
        assert last[name].notna().all()
        assert result.values(f"{name}_mean_over_clients")[-1] == pytest.approx(last[name].mean())
        assert result.values(f"{name}_worst_tenth")[-1] == last[name].min()  # of three clients
        assert result.values(f"{name}_std_over_clients")[-1] == pytest.approx(last[name].std(ddof=0))


def test_a_clients_personal_model_is_exported(finished: Path, tmp_path: Path) -> None:
    model = load_run_model(open_run(finished), print)
    server, client = model.server, next(iter(model.server.accepted))
    stored = open_run(finished)
    state = StoredStates(stored.clients, stored.experiment).load(client, Callback())
    whole, own = global_model(server), client_model(server, client, state)
    deviation = Deviation.kept_in(state.uploads[server.accepted[client]])
    for name, layer in server.layers.items():
        gained = own.deltas[name].to(dtype=torch.float64)
        dense = gained if isinstance(gained, torch.Tensor) else gained.dense()
        before = whole.deltas[name]
        before = before if isinstance(before, torch.Tensor) else before.dense()
        wanted = before + layer.scale * deviation.lora[name].to(dtype=torch.float64).dense()
        torch.testing.assert_close(dense, wanted)
    for name, value in server.head.items():
        assert torch.equal(own.head[name], value + deviation.head[name])
    out = export(finished, as_="adapter", out=tmp_path / "adapter", client=client, console=quiet())
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "The personal model is the global model and this client's deviation from it." in card
    assert "personal" in card
    assert "own\\_accuracy" not in card
    facts = json.loads((out / "fedsmoothlora.json").read_text(encoding="utf-8"))
    assert facts["personal"] is True
    final = {(line[1], line[2]): line[3] for line in recorded(finished) if line[0] == 3}
    assert facts["figures"]["personal_accuracy"] == final[client, "personal_accuracy"]


def test_the_card_of_the_global_model_has_the_spread_over_clients(finished: Path) -> None:
    card = (finished / "model" / "README.md").read_text(encoding="utf-8")
    assert "## Over clients" in card
    for name in (
        "accuracy_worst_tenth",
        "personal_accuracy_mean_over_clients",
        "tuned_accuracy_std_over_clients",
    ):
        assert card.count(f"| {name} |") == 1


@pytest.mark.parametrize("key", ["personal.ditto", "evaluation.personal_steps"])
def test_personal_models_need_validation_rows(toy_table: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(read(toy_table, {"method.name": "fedit", key: 1}))
    assert f"{key} = 1" in str(error.value)
    assert "data.validation" in str(error.value)


def test_the_example_of_the_page_is_valid() -> None:
    page = (Path(__file__).parents[2] / "docs" / "personal.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```toml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    config = read(tomllib.loads(example))
    assert config.personal.ditto is not None
    assert config.evaluation.personal_steps is not None
