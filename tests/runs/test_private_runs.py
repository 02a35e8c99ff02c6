"""Private runs from the configuration to the report: epsilon everywhere, a ledger that no crash forgets."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from fedsmoothlora import Federation, export
from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.errors import ExportError, InterruptedRunError, StateError
from fedsmoothlora.federation.server import Server
from fedsmoothlora.methods import ServerView
from fedsmoothlora.methods.fedsmoothlora import FedSmoothLoRA
from fedsmoothlora.reports.report import write_report
from fedsmoothlora.runs.check import check
from fedsmoothlora.runs.session import run

pytest.importorskip("opacus")

ON: dict[str, Any] = {"unit": "client", "clip_norm": 0.5, "noise_multiplier": 1.5, "delta": 1e-5}
SEEDED = {**ON, "seed": 3}
POISSON = {"sampling": "poisson", "fraction": 0.5}


@pytest.fixture
def table(toy_table: dict[str, Any]) -> dict[str, Any]:
    training = {"rounds": 2, "steps": 1, "batch_size": 8, "lr": 0.02}
    return {**toy_table, "training": training, "privacy": SEEDED, "participation": POISSON}


def trained(table: dict[str, Any], out: Path, **options: Any) -> tuple[Path, str]:
    """The folder of a run, and the text on its terminal."""
    text = io.StringIO()
    where = {"resume": out} if options.pop("resume", False) else {"out": out}
    run(table, **where, console=Console(file=text, width=200), **options)
    return out, text.getvalue()


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def releases(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "privacy.json").read_text(encoding="utf-8"))[
        "releases"
    ]
    return found


def epsilons(folder: Path) -> list[float]:
    return [line["value"] for line in lines(folder) if line["name"] == "epsilon"]


def test_epsilon_is_in_the_terminal_the_metrics_the_ledger_and_the_card(
    table: dict[str, Any], tmp_path: Path
) -> None:
    table["privacy"] = ON
    folder, shown = trained(table, tmp_path / "run")
    found = epsilons(folder)

    assert 0 < found[0] < found[1]
    assert [one["epsilon"] for one in releases(folder)] == found
    assert [one["round"] for one in releases(folder)] == [1, 2]
    assert {(one["noise_multiplier"], one["sample_rate"]) for one in releases(folder)} == {(1.5, 0.5)}
    for round, value in enumerate(found, 1):
        assert re.search(rf"round {round}/2 .* epsilon {value:.4g}", shown)
    assert f"privacy: epsilon {found[1]:.4g} at delta 1e-05 after 2 rounds, for each of 3 clients" in shown
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert f"**epsilon = {found[1]:.4g} at delta = 1e-05** after\n2 releases" in card
    facts = json.loads((folder / "model" / "fedsmoothlora.json").read_text(encoding="utf-8"))
    assert facts["privacy"]["epsilon"] == found[1]
    assert not facts["privacy"]["seeded"]
    for text in (shown, card):
        assert "not private" not in text.lower()


def test_an_export_says_what_the_run_has_spent_and_no_clients_own_model_is_exported(
    table: dict[str, Any], tmp_path: Path
) -> None:
    folder, _ = trained({**table, "privacy": ON}, tmp_path / "run", outputs=False)
    out = export(folder, "adapter", round=1, out=tmp_path / "adapter", console=Console(quiet=True))
    spent = releases(folder)[-1]["epsilon"]  # all that the run has released, not only its first round
    assert f"**epsilon = {spent:.4g} at delta = 1e-05**" in (out / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ExportError, match="a client's own model is no private release"):
        export(folder, "adapter", client="0", out=tmp_path / "own", console=Console(quiet=True))
    (folder / "privacy.json").unlink()
    with pytest.raises(StateError, match=r"privacy.json is missing"):
        export(folder, "adapter", out=tmp_path / "again", console=Console(quiet=True))


def test_a_run_with_a_seed_says_not_private_everywhere(table: dict[str, Any], tmp_path: Path) -> None:
    folder, shown = trained(table, tmp_path / "run")
    assert "this run is NOT private" in shown
    assert shown.count("(not private: seeded noise)") == 2
    assert "NOT private" in (folder / "run.log").read_text(encoding="utf-8")
    assert "**NOT private**" in (folder / "model" / "README.md").read_text(encoding="utf-8")
    console = io.StringIO()
    check(read(table), Console(file=console, width=200))
    assert "this run is NOT private" in console.getvalue()
    assert "NOT private: noise and sampling follow from privacy.seed" in console.getvalue()


@pytest.mark.report
def test_the_report_shows_epsilon_and_nothing_of_single_clients(
    table: dict[str, Any], tmp_path: Path
) -> None:
    folder, _ = trained(table, tmp_path / "run")
    text = write_report(folder).read_text(encoding="utf-8")
    assert "This run is NOT private" in text
    assert "of a client, at δ = 1e-05; not private: seeded noise" in text
    assert f"{epsilons(folder)[-1]:.3g}"[:4] in text
    for section in ("partition", "clients", "log", "bytes"):
        assert f'id="{section}"' not in text
    assert not (folder / "partition.png").exists()


def test_runs_with_noise_of_the_system_differ_and_seeded_ones_are_the_same_bits(
    table: dict[str, Any], tmp_path: Path
) -> None:
    table["training"]["rounds"] = 1
    seeded = [update(trained(table, tmp_path / name, outputs=False)[0]) for name in ("a", "b")]
    assert all(torch.equal(value, seeded[1][name]) for name, value in seeded[0].items())
    table["privacy"] = ON
    secret = [update(trained(table, tmp_path / name, outputs=False)[0]) for name in ("c", "d")]
    assert not any(torch.equal(value, secret[1][name]) for name, value in secret[0].items())


def update(folder: Path, round: int = 1) -> dict[str, torch.Tensor]:
    return load_file(folder / "updates" / f"{round:04d}.safetensors")


def test_a_release_is_on_disk_before_it_is_computed_and_a_repeated_round_counts_again(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run dies between the release and its checkpoint; the resumed run ends with the same bits."""
    whole, _ = trained(table, tmp_path / "whole", outputs=False)
    folder = tmp_path / "killed"
    aggregate: Callable[..., Any] = FedSmoothLoRA.aggregate

    def dying(self: FedSmoothLoRA, uploads: Any, weights: Any, server: ServerView) -> Any:
        assert len(releases(folder)) == server.round + 1  # before anything of it can leave the server
        if server.round == 1:
            raise InterruptedRunError("killed")
        return aggregate(self, uploads, weights, server)

    with monkeypatch.context() as patched:
        patched.setattr(FedSmoothLoRA, "aggregate", dying)
        with pytest.raises(InterruptedRunError):
            trained(table, folder, outputs=False)
    trained(table, folder, outputs=False, resume=True)

    assert [one["round"] for one in releases(folder)] == [1, 2, 2]
    assert epsilons(folder)[0] == epsilons(whole)[0]
    assert epsilons(folder)[1] == releases(folder)[-1]["epsilon"] > epsilons(whole)[1]
    for round in (1, 2):
        one, other = update(whole, round), update(folder, round)
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_run_without_its_ledger_is_not_resumed(table: dict[str, Any], tmp_path: Path) -> None:
    folder, _ = trained(table, tmp_path / "run", outputs=False)
    (folder / "privacy.json").unlink()
    with pytest.raises(StateError, match=r"privacy.json is missing, and the run has finished 2 rounds"):
        trained(table, folder, resume=True)


def test_a_target_is_met_and_a_run_that_would_pass_it_ends(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table["privacy"] = {**{k: v for k, v in SEEDED.items() if k != "noise_multiplier"}, "target_epsilon": 4.0}
    table[
        "participation"
    ] = {}  # Renyi divergence is simple without sampling, so that the noise is found at once
    folder = tmp_path / "run"

    def dying(self: Server, replies: Any, total: Any) -> Any:
        assert self.private is not None
        self.private.budget.spend(self.round)
        raise InterruptedRunError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(Server, "aggregate", dying)
        with pytest.raises(InterruptedRunError):
            trained(table, folder)
    _, shown = trained(table, folder, resume=True)

    assert [one["round"] for one in releases(folder)] == [1, 1]
    assert 3.8 < releases(folder)[-1]["epsilon"] <= 4.0
    reason = "another release would pass privacy.target_epsilon = 4"
    assert f"the run ends after round 1 of 2: {reason}" in shown
    assert reason in json.loads((folder / "stopped.json").read_text(encoding="utf-8"))["reason"]
    assert (folder / "model" / "README.md").is_file()


def test_check_forecasts_epsilon_and_the_noise(table: dict[str, Any]) -> None:
    console = io.StringIO()
    check(read({**table, "privacy": ON}), Console(file=console, width=200))
    text = console.getvalue()
    assert re.search(r"privacy: epsilon \d\.\d+ at delta 1e-05 after 2 rounds, for each of 3 clients", text)
    assert "each client takes part with probability 0.5" in text
    assert "noise multiplier 1.5: the noise of every released number has the standard deviation 0.5" in text
    assert "NOT private" not in text


def test_too_large_a_delta_is_refused_before_training(table: dict[str, Any], tmp_path: Path) -> None:
    table["privacy"] = {**ON, "delta": 0.5}
    with pytest.raises(ConfigError, match=r"privacy.delta = 0.5 with 3 clients"):
        trained(table, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_federation_of_an_own_model_is_private_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    rows = TensorDataset(torch.randn(12, 6), torch.randint(3, (12,)))
    settings: dict[str, Any] = {
        "method": "fedit",
        "lora": {"r": 2, "target_modules": ["0"]},
        "head": ["2"],
        "training": {"rounds": 1, "steps": 1, "batch_size": 4},
        "machine": {"threads": 1, "device": "cpu"},
        "privacy": ON,
    }
    federation = Federation(model, [rows, rows], test=rows, **settings)
    folder = federation.run(tmp_path / "run", console=Console(quiet=True)).folder
    assert epsilons(folder) == [releases(folder)[0]["epsilon"]]
    assert all(line["client"] is None for line in lines(folder))
    card = federation.save_adapter(tmp_path / "adapter") / "README.md"
    assert "differentially private for each client" in card.read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match=r"validation= with privacy.unit"):
        Federation(model, [rows, rows], test=rows, validation={0: rows}, **settings)


def test_a_clip_norm_that_follows_a_quantile_is_the_same_after_a_resume(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table["privacy"] = {**SEEDED, "clip_quantile": 0.5, "quantile_noise": 1.0}
    table["training"]["rounds"] = 3
    whole, shown = trained(table, tmp_path / "whole")
    assert "of which the quantile takes a part: that of the mean is 2.268" in shown
    card = (whole / "model" / "README.md").read_text(encoding="utf-8")
    assert "Uploads were clipped to\na quantile of their norms and noised with multiplier\n1.5 by" in card
    folder = tmp_path / "killed"
    aggregate: Callable[..., Any] = FedSmoothLoRA.aggregate

    def dying(self: FedSmoothLoRA, uploads: Any, weights: Any, server: ServerView) -> Any:
        if server.round == 2:
            raise InterruptedRunError("killed")
        return aggregate(self, uploads, weights, server)

    with monkeypatch.context() as patched:
        patched.setattr(FedSmoothLoRA, "aggregate", dying)
        with pytest.raises(InterruptedRunError):
            trained(table, folder, outputs=False)
    trained(table, folder, outputs=False, resume=True)
    norms = [[line["value"] for line in lines(one) if line["name"] == "clip_norm"] for one in (whole, folder)]
    assert norms[0] == norms[1]
    assert len(set(norms[0])) == 3
    for round in (1, 2, 3):
        assert all(update(whole, round)[name].equal(value) for name, value in update(folder, round).items())
