"""Comparisons, forecasts and tuning of private configurations."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.experiments.compare import compare, prepare
from fedsmoothlora.experiments.forecast import measure
from fedsmoothlora.experiments.tuning import tune
from fedsmoothlora.experiments.variants import Variant
from fedsmoothlora.runs.planning import plan

pytest.importorskip("opacus")


@pytest.fixture
def table(toy_table: dict[str, Any]) -> dict[str, Any]:
    privacy = {"unit": "client", "clip_norm": 0.5, "noise_multiplier": 1.0, "delta": 1e-5}
    training = {"rounds": 1, "steps": 1, "batch_size": 8, "lr": 0.02}
    return {**toy_table, "privacy": privacy, "training": training}


def test_private_methods_are_compared_without_diagnostics(table: dict[str, Any], tmp_path: Path) -> None:
    variants = [Variant(label=name, overrides={"method.name": name}) for name in ("fedit", "ffa")]
    planned = prepare(table, variants, out=tmp_path / "out", seeds=1, jobs=1, begin=False)
    configs = [one.config for one in planned.planned_runs.values()]
    assert [one.evaluation.diagnostics for one in configs] == [False, False]
    assert all(one.privacy.on for one in configs)


@pytest.mark.slow
def test_a_private_comparison_has_metrics_of_the_test_set(table: dict[str, Any], tmp_path: Path) -> None:
    del table["method"]
    text = io.StringIO()
    found = compare(
        table, ["fedit", "ffa"], out=tmp_path / "out", seeds=1, console=Console(file=text, width=200)
    )
    assert not found.failed
    assert "fedit" in text.getvalue()


def test_a_private_configuration_is_forecast(table: dict[str, Any]) -> None:
    pace = measure(plan(read(table)))
    assert pace.row > 0
    assert pace.up[0] > 0


def test_tuning_on_validation_rows_is_refused(table: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"privacy.unit = 'client': tuning compares metrics on the clients'"
    ):
        tune(table, ["fedit"], {"training.lr": [0.1, 0.2]}, out=tmp_path / "out", console=Console(quiet=True))
    assert not (tmp_path / "out").exists()
