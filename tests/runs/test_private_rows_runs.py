"""Runs with sample-level privacy from the configuration to the report, and after they were interrupted."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file
from test_private_runs import epsilons, lines, trained

from fedsmoothlora import export
from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.errors import InterruptedRunError
from fedsmoothlora.federation import client
from fedsmoothlora.reports.report import write_report
from fedsmoothlora.runs.check import check

pytest.importorskip("opacus")

ON: dict[str, Any] = {
    **{"unit": "sample", "clip_norm": 0.5, "noise_multiplier": 1.2, "delta": 1e-3, "sample_rate": 0.25}
}


@pytest.fixture
def table(toy_table: dict[str, Any]) -> dict[str, Any]:
    return {
        **toy_table,
        "lora": {**toy_table["lora"], "dropout": 0.0},
        "training": {"rounds": 2, "steps": 2, "batch_size": 8, "lr": 0.02},
        "method": {"name": "fedsmoothlora", "gamma": 64, "gradient_aligned": "random"},
        "privacy": {**ON, "seed": 3},
    }


def ledger(folder: Path, client: str) -> list[dict[str, Any]]:
    text = (folder / "clients" / client / "privacy.json").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(text)["releases"]
    return found


def test_epsilon_is_in_the_terminal_the_metrics_the_ledgers_and_the_card(
    table: dict[str, Any], tmp_path: Path
) -> None:
    table["privacy"] = ON
    folder, shown = trained(table, tmp_path / "run")
    found = [line["value"] for line in lines(folder) if line["name"] == "epsilon" and line["client"] is None]

    assert 0 < found[0] < found[1]
    for one in "012":
        assert [entry["epsilon"] for entry in ledger(folder, one)] == found
        assert [entry["steps"] for entry in ledger(folder, one)] == [2, 2]
    assert not (folder / "privacy.json").exists()
    assert f"privacy: epsilon {found[1]:.4g} at delta 0.001 after 2 rounds with all clients" in shown
    assert f"epsilon {found[0]:.4g}" in shown
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert f"**epsilon = {found[1]:.4g} at delta = 0.001** after\n2 rounds" in card
    assert "differ in one row" in card
    facts = json.loads((folder / "model" / "fedsmoothlora.json").read_text(encoding="utf-8"))
    assert (facts["privacy"]["unit"], facts["privacy"]["epsilon"]) == ("sample", found[1])
    assert "not private" not in (shown + card).lower()
    own = export(folder, "adapter", client="0", out=tmp_path / "own", console=Console(quiet=True))
    assert f"**epsilon = {found[1]:.4g}" in (own / "README.md").read_text(encoding="utf-8")


@pytest.mark.report
def test_the_report_hides_clients_and_shows_the_largest_epsilon(
    table: dict[str, Any], tmp_path: Path
) -> None:
    folder, _ = trained(table, tmp_path / "run", outputs=False)
    page = write_report(folder).read_text(encoding="utf-8")
    assert "of a row, the largest, at δ = 0.001" in page
    assert "NOT private" in page
    assert "partition" not in page.lower() or "train_loss" not in page


def test_a_seeded_run_that_is_resumed_is_the_same_and_counts_what_was_repeated(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = trained(table, tmp_path / "whole")
    visits = 0
    real = client.train_privately

    def interrupted(*arguments: Any, **options: Any) -> int:
        nonlocal visits
        visits += 1
        if visits == 5:  # the second client of round 2, after its release was recorded
            raise InterruptedRunError("power cut")
        return real(*arguments, **options)

    monkeypatch.setattr(client, "train_privately", interrupted)
    with pytest.raises(InterruptedRunError):
        trained(table, tmp_path / "cut")
    monkeypatch.setattr(client, "train_privately", real)
    cut, _ = trained(table, tmp_path / "cut", resume=True)

    for name in ("model.safetensors",):
        first, second = (load_file(folder / "model" / name) for folder in (whole, cut))
        assert first.keys() == second.keys()
        assert all(first[key].equal(second[key]) for key in first)
    assert [len(ledger(cut, one)) for one in "012"] == [2, 3, 2]
    assert max(epsilons(cut)) == ledger(cut, "1")[-1]["epsilon"] > max(epsilons(whole))


def test_check_forecasts_epsilon_and_refuses_a_large_delta(table: dict[str, Any]) -> None:
    console = io.StringIO()
    check(read({**table, "privacy": ON}), Console(file=console, width=200))
    assert "at delta 0.001 after 2 rounds with all clients, for each row of a client" in console.getvalue()
    public = {key: value for key, value in ON.items() if key != "sample_rate"} | {"public_counts": True}
    console = io.StringIO()
    check(read({**table, "privacy": public}), Console(file=console, width=200))
    assert "for each row of the client that spends most" in console.getvalue()
    with pytest.raises(ConfigError, match=r"privacy.delta = 0.5, and client \d has \d+ rows"):
        check(read({**table, "privacy": {**ON, "delta": 0.5}}), Console(quiet=True))


@pytest.mark.slow
def test_clients_in_processes_of_their_own_give_the_same_run(table: dict[str, Any], tmp_path: Path) -> None:
    one, _ = trained(table, tmp_path / "one")
    two, _ = trained({**table, "machine": {**table["machine"], "jobs": 2}}, tmp_path / "two")
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert all(first[key].equal(second[key]) for key in first)
    assert [ledger(one, c) for c in "012"] == [ledger(two, c) for c in "012"]
