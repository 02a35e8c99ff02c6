"""The page of a comparison: complete, inert, offline, and readable on a phone and on a desk."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from browsing import browse, measure
from fedsmoothlora.config import read
from fedsmoothlora.experiments.page import page
from fedsmoothlora.experiments.planned_runs import PlannedRun
from fedsmoothlora.experiments.results import read_results
from fedsmoothlora.federation.records import Metric, RoundRecord
from fedsmoothlora.storage.run_folder import RunFolder

ROUNDS, SEEDS = 12, 3
METHODS = ("fedsmoothlora", "fedit", "ffa", "rolora", "flora", "fedex", "flexlora", "frlora", "full", "local")
SECTIONS = ["quality", "curves", "cost", "clients", "diagnostics", "runs", "settings"]
DIAGNOSTICS = ("start_distance", "update_norm", "update_cosine", "merged_effective_rank")
OF_CLIENTS = ("start_error", "ga_kept", "start_gradient_cosine", "loss_at_start", "loss_at_end")


def record(k: int, place: int, seed: int, *, diagnostics: bool) -> RoundRecord:
    """Made-up metrics of a round: later methods are better, seeds differ a little."""
    accuracy = 0.9 - (0.8 - place / 50) / (k + 1) + seed / 100
    metrics = [Metric(None, "accuracy", accuracy), Metric(None, "loss", 2.5 * (1 - accuracy))]
    if k:
        metrics += [Metric(None, "bytes_up", 3e7), Metric(None, "bytes_down", 5e7)]
        metrics += [Metric(None, "seconds_round", 70.0 + place)]
        for number in range(4):
            client = f"hospital-{number}"
            metrics += [
                Metric(client, "train_loss", 3 / k),
                Metric(client, "accuracy", accuracy - number / 20),
            ]
            if diagnostics:
                metrics += [Metric(client, name, 1 / k + number / 9) for name in OF_CLIENTS]
        if diagnostics:
            metrics += [Metric(None, name, 1 / k) for name in DIAGNOSTICS]
    return RoundRecord(round=k, metrics=metrics)


def write(
    table: dict[str, Any],
    folder: Path,
    *,
    methods: tuple[str, ...] = METHODS,
    seeds: int = SEEDS,
    diagnostics: bool = True,
) -> Path:
    table = {**table, "description": "For <b>a</b> test."}
    planned_runs = {}
    for place, method in enumerate(methods):
        for seed in range(seeds):
            changes = {"method.name": method, "seed": seed, "training.rounds": ROUNDS}
            config = read({**table, "name": f"x-rays: all: {method}, seed {seed}"}, changes)
            planned_run = PlannedRun(
                f"{method}, seed {seed}", config, folder / "runs" / method / f"seed-{seed}"
            )
            run = RunFolder.create(planned_run.folder)
            diverges = method == "full" and seed == 1
            for k in range(5 if diverges else ROUNDS + 1):
                run.append_metrics(record(k, place, seed, diagnostics=diagnostics and place == 0))
            run.checkpoints.mkdir()
            if diverges:
                reason = "round 5: <script>alert(1)</script> & others diverged"
                planned_run.outcome_file.write_text(f'{{"state": "diverged", "reason": "{reason}"}}')
            else:
                (run.checkpoints / f"{ROUNDS:04d}.json").write_text("{}")
            planned_runs[method, seed] = planned_run
    path = folder / "comparison.html"
    path.write_text(page(read_results(planned_runs)), encoding="utf-8")
    return path


@pytest.fixture
def written(toy_table: dict[str, Any], tmp_path: Path) -> Path:
    toy_table["data"]["validation"] = 0.2
    return write(toy_table, tmp_path / "compared")


def test_everything_is_there_and_nothing_is_fetched_or_run(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    assert re.findall(r'<section id="([a-z]+)"', text) == SECTIONS
    assert "<h1>x-rays: all: a comparison</h1>" in text
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text  # the reason of a run that diverged
    assert "For &lt;b&gt;a&lt;/b&gt; test." in text
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", text)
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    for title in (
        "Distance between clients’ starts",
        "Norm of the server’s update",
        "Cosine of consecutive updates",
        "Effective rank of the merged updates",
        "Error of the start",
        "Alignment kept at the start",
        "Alignment of the start with the gradient",
        "Jump of the loss at a round’s boundary",
        "Accuracy by bytes sent",
        "Difference to fedit",
    ):
        assert f"<h3>{title}</h3>" in text
    assert "full, seed 1: diverged, 4 of 12 rounds" in text
    assert "2 of 3, 1 diverged" in text
    assert "local*" in text
    assert len(text) < 1_000_000


def test_equal_folders_give_equal_pages(toy_table: dict[str, Any], tmp_path: Path) -> None:
    pages = [
        write(toy_table, tmp_path / name, methods=("fedit", "ffa"), seeds=2).read_bytes() for name in "ab"
    ]
    assert pages[0] == pages[1]


def test_without_diagnostics_their_section_is_missing_and_a_single_seed_is_noted(
    toy_table: dict[str, Any], tmp_path: Path
) -> None:
    text = write(toy_table, tmp_path, methods=("fedit",), seeds=1, diagnostics=False).read_text("utf-8")
    assert 'id="diagnostics"' not in text
    assert "One seed only: other seeds" in text
    assert "Difference to" not in text


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_and_follows_the_scheme(
    browser: str, written: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    seen = measure(browser, tmp_path, written, width, scheme)
    assert seen["width"] == width
    assert seen["scrollWidth"] <= width
    assert seen["wide"] == []
    assert seen["resources"] == []
    assert seen["svgs"] == seen["drawn"] == 12
    assert seen["sections"] == SECTIONS
    assert seen["smallest"] >= 9.5
    assert seen["stroke"] == ("rgb(27, 106, 148)" if scheme == "light" else "rgb(109, 189, 230)")
    browse(browser, tmp_path, written, width, scheme, f"--screenshot={tmp_path / 'page.png'}")
    with Image.open(io.BytesIO((tmp_path / "page.png").read_bytes())) as picture:
        colours = picture.convert("RGB").getcolors(maxcolors=2**24)
    assert colours is not None
    assert len(colours) > 50
