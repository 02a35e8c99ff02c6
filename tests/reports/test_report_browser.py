"""The page in a real browser: on a phone and on a desk, light and dark, without a network."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageStat

from browsing import SCHEMES, browse, channels, measure
from fedsmoothlora.reports.report import write_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.toml").write_text(
        'name = "a-run-with-a-rather-long-name-that-does-not-fit-on-a-phone"\n'
        'description = "For a browser."\n'
        '[training]\nrounds = 12\n[lora]\ntarget_modules = ["query_projection", "value_projection"]\n'
        '[method]\nname = "fedsmoothlora"\n[data]\nsource = "hub:someone/a-data-set-with-a-long-name"\n',
        encoding="utf-8",
    )
    lines: list[dict[str, Any]] = []

    def add(round: int, client: str | None, **metrics: float) -> None:
        lines.extend({"round": round, "client": client, "name": n, "value": v} for n, v in metrics.items())

    for k in range(13):
        add(k, None, accuracy=0.9 - 0.8 / (k + 1), loss=2.5 / (k + 1), seconds_evaluation=1.0)
        for number in range(6 if k else 0):
            metrics = {
                "train_loss": 3 / k + number / 9,
                "samples": 90 + number,
                "accuracy": 0.8 - number / k / 9,
            }
            add(k, f"hospital-{number}", **metrics, own_accuracy=0.9, seconds_start=0.5, seconds_training=9.0)
            add(k, f"hospital-{number}", loss=2 / k, own_loss=1 / k, bytes_up=5e6, bytes_down=9e6)
        if k:
            add(
                k,
                None,
                train_loss=3 / k,
                bytes_up=3e7,
                bytes_down=5e7,
                seconds_round=99_999,
                start_error=1 / k,
            )
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    names = ["aeroplane", "bird", "cat", "deer", "dog", "horse"]
    counts = [[(3 * i + 5 * k) % 17 for k in range(6)] for i in range(6)]
    clients = {f"hospital-{number}": row for number, row in enumerate(counts)}
    partition = {"classes": names, "clients": clients, "left_out": 0}
    (folder / "partition.json").write_text(json.dumps(partition), encoding="utf-8")
    confusion = {"classes": names, "matrix": counts}
    (folder / "confusion.json").write_text(json.dumps(confusion), encoding="utf-8")
    (folder / "environment.json").write_text(
        '{"platform": "Linux-6.1-x86_64-with-glibc2.36"}', encoding="utf-8"
    )
    (folder / "run.log").write_text("a rather long line of the log " * 9, encoding="utf-8")
    return write_report(folder)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_and_follows_the_scheme(
    browser: str, report: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    seen = measure(browser, tmp_path, report, width, scheme)
    assert seen["width"] == width
    assert seen["scrollWidth"] <= width
    assert seen["wide"] == []
    assert seen["resources"] == []
    assert seen["svgs"] == seen["drawn"] >= 9
    assert len(seen["sections"]) == 10
    assert seen["smallest"] >= 9.5
    background, colour, stroke = (channels(seen[key]) for key in ("background", "colour", "stroke"))
    if scheme == "dark":
        assert max(background) < 60 < 200 < min(colour)
        assert stroke == [109, 189, 230]
    else:
        assert max(colour) < 60 < 200 < min(background)
        assert stroke == [27, 106, 148]
    if width == 360:
        assert seen["scrolling"] > 0  # Wide tables, in their own box.


@pytest.mark.parametrize("width", [360, 1280])
def test_screenshots_show_something_and_differ_in_brightness(
    browser: str, report: Path, tmp_path: Path, width: int
) -> None:
    brightness = {}
    for scheme in SCHEMES:
        folder = tmp_path / scheme
        folder.mkdir()
        browse(browser, folder, report, width, scheme, f"--screenshot={folder / 'page.png'}")
        with Image.open(io.BytesIO((folder / "page.png").read_bytes())) as picture:
            assert picture.format == "PNG"
            shown = picture.convert("RGB").crop((0, 0, width, picture.height))
        colours = shown.getcolors(maxcolors=2**24)
        assert colours is not None
        assert len(colours) > 50
        brightness[scheme] = ImageStat.Stat(shown.convert("L")).mean[0]
    assert brightness["light"] - brightness["dark"] > 100
