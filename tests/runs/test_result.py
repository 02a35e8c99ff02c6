"""The result of a run: values by name, a frame, one line of text."""

import math
import re
from pathlib import Path

import pytest

from fedsmoothlora import FedSmoothLoRAError
from fedsmoothlora.runs.result import Result

LINES = [
    {"round": 0, "client": None, "name": "loss", "value": 2.0},
    {"round": 1, "client": "a", "name": "train_loss", "value": 1.5},
    {"round": 1, "client": None, "name": "loss", "value": 1.0},
    {"round": 1, "client": None, "name": "perplexity", "value": math.e},
]


@pytest.fixture
def result() -> Result:
    return Result(folder=Path("runs/one"), metrics=LINES)


def test_values_are_those_of_the_global_model_by_round(result: Result) -> None:
    assert result.values("loss") == [2.0, 1.0]
    assert (result.rounds, result.names) == (1, ["loss", "perplexity"])


def test_a_metric_that_was_not_recorded_is_an_error_that_lists_those_that_were(result: Result) -> None:
    with pytest.raises(FedSmoothLoRAError, match=r"no metric 'accuracy'\. Recorded: loss, perplexity"):
        result.accuracy  # noqa: B018 - the property raises
    with pytest.raises(FedSmoothLoRAError, match="Did you mean 'loss'"):
        result.values("los")


def test_the_frame_has_a_row_for_each_round_and_client(result: Result) -> None:
    frame = result.frame()

    assert list(frame.columns) == ["round", "client", "loss", "perplexity", "train_loss"]
    assert frame["round"].tolist() == [0, 1, 1]
    assert frame[frame.client.isna()].loss.tolist() == [2.0, 1.0]
    assert frame[frame.client == "a"].train_loss.tolist() == [1.5]
    assert frame[frame.client == "a"].loss.isna().all()


def test_a_result_is_one_line(result: Result) -> None:
    assert repr(result) == "Result(folder='runs/one', rounds=1, loss=1.0000, perplexity=2.7183)"
    assert repr(Result(folder=Path("x"), metrics=[])) == "Result(folder='x', rounds=0)"


def test_a_notebook_shows_curves_the_last_metrics_and_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/<b>&1")
    folder.mkdir(parents=True)
    (folder / "report.html").touch()
    html = Result(folder=folder, metrics=LINES, stopped="<i>enough</i>")._repr_html_()

    assert html.count("<svg") == 2
    assert '<data value="1.0">1.0000</data>' in html
    assert "runs/&lt;b&gt;&amp;1" in html
    assert "after round 1: &lt;i&gt;enough&lt;/i&gt;" in html
    assert 'href="runs/%3Cb%3E%261/report.html"' in html
    assert [part for part in ("<b>", "<i>", "<script", "http") if part in html] == []


def test_results_on_one_page_of_a_notebook_have_charts_with_ids_of_their_own(result: Result) -> None:
    other = Result(folder=result.folder, metrics=[{**line, "value": 3.0} for line in LINES])
    ids = [set(re.findall(r' id="([^"]+)"', one._repr_html_())) for one in (result, other)]

    assert ids[0]
    assert not ids[0] & ids[1]


def test_a_result_without_metrics_or_with_values_that_are_not_finite_can_be_shown() -> None:
    assert "No round is recorded yet." in Result(folder=Path("x"), metrics=[])._repr_html_()
    broken = [{"round": k, "client": None, "name": "loss", "value": v} for k, v in enumerate((1.0, math.nan))]
    assert "<svg" in Result(folder=Path("x"), metrics=broken)._repr_html_()


def test_a_notebook_says_that_a_run_with_seeded_noise_is_not_private(result: Result) -> None:
    seeded = {"round": 1, "client": None, "name": "seeded_noise", "value": 1.0}
    assert "NOT private" in Result(folder=result.folder, metrics=[*LINES, seeded])._repr_html_()
    assert "NOT private" not in result._repr_html_()
