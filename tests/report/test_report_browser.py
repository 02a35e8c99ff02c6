"""The page in a real browser: on a phone and on a desk, light and dark, without a network."""

import contextlib
import html
import io
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageStat

from fedsmoothlora.report import write_report

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
# Values of Chromium's own enumeration mojom::PreferredColorScheme.
SCHEMES = {"dark": 0, "light": 1}
# A phone's width comes from a frame: the browser's window is never narrower than 500 px. The frame has the
# page's own policy, which stops scripts, so that the one around it measures.
MEASURE = """<!doctype html><meta name="color-scheme" content="light dark">
<style>body { margin: 0 } iframe { border: 0; display: block }</style>
<iframe id="page" width="WIDTH" height="HEIGHT" srcdoc="PAGE"></iframe>
<pre id="measured"></pre>
<script>
window.onload = () => {
  const frame = document.getElementById("page");
  const page = frame.contentDocument, root = page.documentElement;
  const style = node => frame.contentWindow.getComputedStyle(node);
  const wide = [...page.querySelectorAll("body *")]
    .filter(node => !node.closest(".scroll") && !node.closest("svg"))
    .filter(node => node.getBoundingClientRect().right > WIDTH + 0.5);
  const stroke = page.querySelector("#curves svg path[style*='--accent']");
  document.getElementById("measured").textContent = JSON.stringify({
    width: frame.contentWindow.innerWidth,
    scrollWidth: root.scrollWidth,
    wide: wide.map(node => node.outerHTML.slice(0, 120)),
    svgs: page.querySelectorAll("svg").length,
    drawn: [...page.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().height > 80).length,
    scrolling: [...page.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth).length,
    smallest: Math.min(...[...page.querySelectorAll("#curves svg")].map(
      svg => 9.5 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)),
    background: style(page.body).backgroundColor,
    colour: style(page.body).color,
    stroke: style(stroke).stroke,
    resources: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
    sections: [...page.querySelectorAll("section")].map(section => section.id),
  });
};
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        message = f"no browser: none of {', '.join(BROWSERS)} is installed"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


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

    def add(round: int, client: str | None, **figures: float) -> None:
        lines.extend({"round": round, "client": client, "name": n, "value": v} for n, v in figures.items())

    for k in range(13):
        add(k, None, accuracy=0.9 - 0.8 / (k + 1), loss=2.5 / (k + 1), seconds_evaluation=1.0)
        for number in range(6 if k else 0):
            figures = {
                "train_loss": 3 / k + number / 9,
                "samples": 90 + number,
                "accuracy": 0.8 - number / k / 9,
            }
            add(k, f"hospital-{number}", **figures, own_accuracy=0.9, seconds_start=0.5, seconds_training=9.0)
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


def browse(browser: str, folder: Path, page: Path, width: int, scheme: str, *flags: str) -> bytes:
    """What the browser writes; it is ended with everything that it started, however it goes."""
    height = 800
    around = folder / "around.html"
    text = html.escape(page.read_text(encoding="utf-8"))
    around.write_text(
        MEASURE.replace("WIDTH", str(width)).replace("HEIGHT", str(height)).replace("PAGE", text),
        encoding="utf-8",
    )
    command = [
        *(browser, *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}"),
        *(f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"),
        around.as_uri(),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors.decode(errors="replace")[-2000:]
    return output


def measure(browser: str, folder: Path, page: Path, width: int, scheme: str) -> dict[str, Any]:
    dumped = browse(browser, folder, page, width, scheme, "--dump-dom").decode("utf-8")
    found = re.search(r'<pre id="measured">(.+?)</pre>', dumped, flags=re.DOTALL)
    assert found is not None, dumped[-500:]
    return dict(json.loads(html.unescape(found[1])))


def channels(colour: str) -> list[float]:
    return [float(number) for number in re.findall(r"[\d.]+", colour)[:3]]


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
