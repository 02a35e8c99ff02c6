"""The page of a run: complete, honest about what was not measured, inert, offline and small."""

import itertools
import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from statistics import pstdev
from types import SimpleNamespace

import pytest
from jinja2 import UndefinedError

from fedsmoothlora.errors import ReportError
from fedsmoothlora.reports import charts
from fedsmoothlora.reports.metrics import METRICS, ROUND_PHASES
from fedsmoothlora.reports.rendering import render
from fedsmoothlora.reports.report import write_report
from fedsmoothlora.reports.svg import inline

CONFIG = """\
name = "trial"
description = "A run for a test."
seed = 0

[model]
source = "pkg:dinov2-small"

[data]
source = "pkg:mnist-5k"

[lora]
r = 8
target_modules = ["q_proj", "v_proj"]

[method]
name = "fedsmoothlora"
round_matching = true

[training]
rounds = 10
lr = 0.003
"""
EVIL = "<script>alert(1)</script>"
SECTIONS = ["curves", "clients", "partition", "bytes", "seconds", "confusion", "diagnostics", "settings"]
VOID = {"meta", "link", "br", "hr", "img", "input", "use", "path"}


class Page(HTMLParser):
    """What the tests look for on a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID or f"</{tag}>" in self.source:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self) -> str:
        return " ".join(text for tag, text in self.texts if tag != "style")

    def sections(self) -> list[str | None]:
        return [attributes.get("id") for attributes in self.all("section")]

    def values(self) -> set[float]:
        return {float(attributes["value"] or "nan") for attributes in self.all("data")}


def recorded(round: int, client: str | None, name: str, value: float) -> str:
    return json.dumps({"round": round, "client": client, "name": name, "value": value})


def metrics(rounds: int = 3, clients: tuple[str, ...] = ("0", "1", "2")) -> list[str]:
    lines = [recorded(0, None, "accuracy", 0.125), recorded(0, None, "loss", 2.71875)]
    for k in range(1, rounds + 1):
        lines += [recorded(k, None, "accuracy", 0.125 + k / 16), recorded(k, None, "loss", 2.71875 - k / 8)]
        for number, client in enumerate(clients):
            lines += [
                recorded(k, client, "train_loss", 3 - k / 8 + number / 32),
                recorded(k, client, "samples", 100 + number),
                recorded(k, client, "accuracy", 0.25 + k / 32 + number / 64 / len(clients)),
                recorded(k, client, "seconds_training", 1.5),
            ]
        lines += [
            recorded(k, None, "clients", len(clients)),
            recorded(k, None, "train_loss", 3 - k / 8),
            recorded(k, None, "bytes_up", 1000 * k),
            recorded(k, None, "bytes_down", 3000),
            recorded(k, None, "seconds_round", 7.0),
            recorded(k, None, "seconds_evaluation", 0.5),
            recorded(k, None, "start_error", 0.5**k),
        ]
    return lines


def titles(page: Page, section: str) -> list[str]:
    """The titles of a section's charts."""
    body = page.source.partition(f'<section id="{section}"')[2].partition("</section>")[0]
    return re.findall("<h3>(.*?)</h3>", body)


def write(folder: Path, lines: list[str], config: str = CONFIG, end: str = "\n", **files: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(config, encoding="utf-8")
    (folder / "metrics.jsonl").write_text("\n".join(lines) + end, encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def full(folder: Path) -> Path:
    write(
        folder,
        metrics(),
        environment={"python": "3.12.1", "libraries": {"torch": "2.9.0"}},
        partition={
            "classes": ["cat", "dog"],
            "clients": {"0": [90, 10], "1": [0, 101], "2": [51, 51]},
            "left_out": 4,
        },
        confusion={"classes": ["cat", "dog"], "matrix": [[40, 10], [7, 43]]},
    )
    (folder / "run.log").write_text("round 1\nround 2\n", encoding="utf-8")
    return folder


def test_a_full_folder_gives_every_section(tmp_path: Path) -> None:
    path = write_report(full(tmp_path / "run"))
    assert path == tmp_path / "run" / "report.html"
    assert Page(path).sections() == [*SECTIONS, "environment", "log"]


def test_missing_data_has_no_section(tmp_path: Path) -> None:
    page = Page(write_report(write(tmp_path, [recorded(0, None, "accuracy", 0.5)])))
    assert page.sections() == ["curves", "settings"]
    assert not re.search(r"NaN|undefined|None", page.text())


def test_a_run_that_recorded_nothing_yet_shows_its_settings(tmp_path: Path) -> None:
    page = Page(write_report(write(tmp_path, [], end="")))
    assert page.sections() == ["settings"]
    assert not page.all("data")


def test_numbers_are_those_of_the_metrics(tmp_path: Path) -> None:
    page = Page(write_report(full(tmp_path)))
    text = page.text()
    for shown in ("0.3125", "+0.1875 since round 0", "2.3438", "−0.3750 since round 0", "of 10 planned"):
        assert shown in text
    for shown in ("6 kB", "9 kB", "22.5 s"):
        assert shown in text
    measured = {float(json.loads(line)["value"]) for line in metrics()}
    # Everything of the server, round by round, and every client's latest; sums and medians besides.
    server = {
        float(parsed["value"])
        for line in metrics()
        if (parsed := json.loads(line))["client"] is None
        and parsed["name"] not in ("clients", "start_error", "seconds_evaluation")
    }
    assert server <= page.values()
    sums = {3.0, 6000.0, 9000.0, 22.5, 21.0, 1.5, 4.5, 13.5, 0.5}
    # Of the matrix [[40, 10], [7, 43]]: precision, recall, F1 and support of each class.
    by_class = {40 / 47, 43 / 53, 40 / 50, 43 / 50, 80 / 97, 86 / 103, 50.0}
    spreads = {
        pstdev([0.25 + 3 / 32 + number / 64 / 3 for number in range(3)]),
        pstdev([3 - 3 / 8 + number / 32 for number in range(3)]),
    }
    assert page.values() <= measured | sums | by_class | spreads


def test_uploads_left_out_and_refused_are_shown_with_the_clients(tmp_path: Path) -> None:
    lines = metrics() + [recorded(k, None, "left_out", 2) for k in (1, 2)] + [recorded(2, None, "refused", 1)]
    page = Page(write_report(write(tmp_path, lines)))
    assert "Uploads left out: 4. Uploads refused: 1." in page.text()
    assert titles(page, "diagnostics") == ["Error of the start"]


def test_diagnostics_are_explained_and_hold_no_metric_of_another_section(tmp_path: Path) -> None:
    others = ("mean_of_clients", "bytes_down_validation", "left_out", "refused", "clients")
    lines = metrics() + [recorded(1, None, name, 3) for name in others]
    lines += [recorded(1, "1", name, 0.5) for name in ("macro_f1", "own_auroc", "on_test_loss", "bytes_down")]
    lines += [recorded(1, None, "my_own_number", 0.5), recorded(1, "1", "ga_kept", 0.5)]
    page = Page(write_report(write(tmp_path, lines)))
    assert titles(page, "diagnostics") == [
        "My own number",
        "Error of the start",
        "Alignment kept at the start over clients",
    ]
    for name in ("start_error", "ga_kept"):
        assert METRICS[name].formula
        assert METRICS[name].description in page.text()
    assert "Recorded as my_own_number by code outside the package." in page.text()
    for row in ("macro F1", "own AUROC", "own loss on the test set"):
        assert f'<th scope="row">{row}</th>' in page.source
    assert "down, for validation" in page.text()


def test_means_of_clients_models_are_not_called_the_global_model(tmp_path: Path) -> None:
    page = Page(write_report(write(tmp_path, [*metrics(), recorded(1, None, "mean_of_clients", 3)])))
    labels = " ".join(svg["aria-label"] or "" for svg in page.all("svg"))
    assert "mean of clients’ models: from 0.1250" in labels
    assert "global model" not in labels


def test_every_phase_of_a_round_has_a_colour() -> None:
    parts = {name: {1: 1.0} for name in ROUND_PHASES}
    drawn = charts.stacked_chart(parts, ylabel="seconds")
    assert len({bar.get_facecolor() for bar in drawn.axes[0].patches}) == len(ROUND_PHASES) == 8


def test_a_name_that_a_template_lacks_is_an_error() -> None:
    without_footer = SimpleNamespace(
        title="", heading="", description="", warning="", facts={}, highlights=(), sections=()
    )
    with pytest.raises(UndefinedError, match="footer"):
        render(without_footer)  # type: ignore[arg-type]


def test_worst_median_and_best_clients_are_named(tmp_path: Path) -> None:
    lines = [recorded(1, c, "accuracy", v) for c, v in (("a", 0.25), ("b", 0.75), ("c", 0.5))]
    lines += [recorded(1, c, "loss", v) for c, v in (("a", 0.25), ("b", 0.75), ("c", 0.5))]
    text = " ".join(Page(write_report(write(tmp_path, lines))).text().split())
    # Worst, median, best, mean, the worst tenth (of three clients the worst one), and the standard deviation.
    assert re.search(r"accuracy 1 0\.2500 client a 0\.5000 0\.7500 client b 0\.5000 0\.2500 0\.2041", text)
    assert re.search(r"loss 1 0\.7500 client b 0\.5000 0\.2500 client a 0\.5000 0\.7500 0\.2041", text)


def test_the_page_loads_nothing_from_outside(tmp_path: Path) -> None:
    page = Page(write_report(full(tmp_path)))
    for _, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            value = attributes.get(key)
            assert value is None or value.startswith("#") or value == "data:,"
    assert not re.search(r"@import|url\((?!#)", page.source)
    assert "default-src 'none'" in page.source
    assert not page.all("script")


def test_the_page_is_accessible(tmp_path: Path) -> None:
    page = Page(write_report(full(tmp_path)))
    assert page.all("html")[0]["lang"] == "en"
    assert "trial" in next(text for tag, text in page.texts if tag == "title")
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(page.all("svg")) >= 9
    assert all(svg["role"] == "img" and len(svg["aria-label"] or "") > 20 for svg in page.all("svg"))
    assert page.all("th")
    assert all(th.get("scope") in ("col", "row") for th in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))


def test_ids_are_unique_and_every_reference_has_its_target(tmp_path: Path) -> None:
    page = Page(write_report(full(tmp_path)))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:href="|url\()#([^")]+)', page.source)
    assert targets
    assert set(targets) <= set(ids)


def test_charts_have_no_colour_of_their_own(tmp_path: Path) -> None:
    page = Page(write_report(full(tmp_path)))
    drawings = re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL)
    assert drawings
    for drawing in drawings:
        assert not re.search(r"#[0-9a-f]{6}\b", drawing)
        assert "<style" not in drawing
    used = set(re.findall(r"var\(--(\w+)\)", page.source))
    assert used <= set(charts.LIGHT)
    assert list(charts.LIGHT) == list(charts.DARK)
    assert len(set(charts.LIGHT.values())) == len(charts.LIGHT)


def luminance(rgb: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """WCAG 2.2, definition of contrast ratio."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [charts.LIGHT, charts.DARK], ids=["light", "dark"])
def test_contrast_is_sufficient_in_both_schemes(palette: dict[str, str]) -> None:
    rgb = {name: tuple(int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)) for name, code in palette.items()}
    for name in ("ink", "quiet", "accent"):
        assert contrast(rgb[name], rgb["paper"]) >= 4.5
    for name in ("second", "third", "fourth", "fifth"):
        assert contrast(rgb[name], rgb["paper"]) >= 3
    for level in range(21):
        cell = tuple(
            level / 20 * a + (1 - level / 20) * p for a, p in zip(rgb["accent"], rgb["paper"], strict=True)
        )
        assert contrast(rgb[charts.text_on(level / 20)], cell) >= 4.2


def test_text_from_files_is_inert(tmp_path: Path) -> None:
    evil = f"\"'{EVIL}$x$ ${{title}}"
    config = CONFIG.replace('"trial"', json.dumps(evil)).replace('"A run for a test."', json.dumps(evil))
    lines = metrics(clients=(EVIL, "1"))
    lines += [recorded(1, None, EVIL, 1.0), recorded(1, "1", f"{EVIL} onload=x", 1.0)]
    lines += [recorded(1, "1", 'a" onload="x', 1.0)]
    folder = write(
        tmp_path,
        lines,
        config,
        environment={EVIL: EVIL, "libraries": {EVIL: EVIL}},
        partition={"classes": [EVIL, "$x$"], "clients": {EVIL: [1, 2], "\x00\n--> $": [3, 4]}, "left_out": 0},
        confusion={"classes": [EVIL, "$\\frac$"], "matrix": [[1, 2], [3, 4]]},
    )
    (folder / "run.log").write_text(EVIL + "\n</pre>" + EVIL, encoding="utf-8")
    page = Page(write_report(folder))
    assert not page.all("script")
    assert "<script" not in page.source
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert EVIL in page.text()


def test_names_in_any_script_are_drawn(tmp_path: Path) -> None:
    partition = {"classes": ["猫", "犬", "🐦"], "clients": {"病院": [1, 2, 3]}, "left_out": 0}
    assert "猫" in write_report(write(tmp_path, metrics(), partition=partition)).read_text(encoding="utf-8")


def test_a_half_written_last_line_is_ignored(tmp_path: Path) -> None:
    half = recorded(4, None, "accuracy", 0.99)[:-4]
    page = Page(write_report(write(tmp_path, [*metrics(), half], end="")))
    assert "0.99" not in page.source
    assert "after round 4" not in page.text()
    assert "1 line of metrics.jsonl could not be read and is left out." in page.text()
    assert {0.3125, 2.34375} <= page.values()


def test_a_line_cut_within_a_letter_is_ignored(tmp_path: Path) -> None:
    folder = write(tmp_path, metrics())
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write('{"round": 4, "client": "é'.encode()[:-1])
    assert "1 line of metrics.jsonl" in Page(write_report(folder)).text()


def test_a_round_that_was_run_again_counts_once(tmp_path: Path) -> None:
    lines = [*metrics(), recorded(3, None, "bytes_up", 500), recorded(3, None, "accuracy", 0.875)]
    page = Page(write_report(write(tmp_path, lines)))
    assert {3500.0, 0.875} <= page.values()
    assert 0.3125 not in page.values()


def test_values_that_are_not_numbers_leave_a_gap(tmp_path: Path) -> None:
    lines = [recorded(k, None, "loss", v) for k, v in enumerate((2.0, 1.5, math.nan, 1.0, math.inf))]
    lines += [recorded(k, "0", "train_loss", math.nan) for k in (1, 2)]
    lines += [recorded(k, None, "start_error", math.nan) for k in (1, 2)]
    lines += [recorded(k, None, "seconds_evaluation", -math.inf) for k in (1, 2)]
    page = Page(write_report(write(tmp_path, lines)))
    assert "Latest loss ∞ after round 4" in " ".join(page.text().split())
    labels = {svg["aria-label"] for svg in page.all("svg")}
    assert any("from 2.0000 at round 0 to 1.0000 at round 3" in (label or "") for label in labels)
    line = charts.Line("loss", {0: 2.0, 1: 1.5, 2: math.nan, 3: 1.0, 4: 0.5})
    drawn = inline(charts.line_chart([line]), "x", "a curve with a gap")
    path = re.search(r'd="([^"]*)"[^>]*style="[^"]*stroke: var\(--accent\); stroke-width: 2', drawn)
    assert path is not None
    assert path[1].count("M") == 2


def test_equal_folders_give_equal_pages(tmp_path: Path) -> None:
    first = write_report(full(tmp_path / "one")).read_bytes()
    assert write_report(full(tmp_path / "two")).read_bytes() == first
    assert write_report(tmp_path / "one").read_bytes() == first


def test_a_thousand_clients_fit_on_a_small_page(tmp_path: Path) -> None:
    clients = tuple(map(str, range(1000)))
    classes = [f"class {number}" for number in range(100)]
    folder = write(
        tmp_path,
        metrics(rounds=20, clients=clients),
        partition={
            "classes": classes,
            "clients": {c: [(int(c) * 7 + k * k) % 13 for k in range(100)] for c in clients},
            "left_out": 0,
        },
        confusion={
            "classes": classes,
            "matrix": [[(i * 31 + k * k) % 17 for k in range(100)] for i in range(100)],
        },
    )
    began = time.process_time()
    path = write_report(folder)
    assert time.process_time() - began < 10
    assert path.stat().st_size < 2_000_000
    text = Page(path).text()
    assert "The 10 worst and the 10 best of 1,000 clients by latest accuracy" in text
    assert "40 of 1,000 clients" in text


def test_five_hundred_rounds_fit_on_a_small_page(tmp_path: Path) -> None:
    began = time.process_time()
    path = write_report(write(tmp_path, metrics(rounds=500)))
    assert time.process_time() - began < 10
    assert path.stat().st_size < 2_000_000


def test_a_folder_that_is_not_a_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=rf"{tmp_path}/none is not a folder"):
        write_report(tmp_path / "none")
    with pytest.raises(ReportError, match=rf"{tmp_path} .*config\.toml is missing"):
        write_report(tmp_path)
    (tmp_path / "config.toml").write_text(CONFIG, encoding="utf-8")
    with pytest.raises(ReportError, match=rf"{tmp_path} .*metrics\.jsonl is missing"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.toml", "name = ", "config.toml: cannot be read"),
        ("environment.json", "{", "environment.json: cannot be read as JSON"),
        ("environment.json", "[]", "environment.json: holds list"),
        ("partition.json", "{}", "partition.json: needs classes and clients"),
        (
            "partition.json",
            '{"classes": ["a"], "clients": {"0": [1, 2]}}',
            "client 0 has 2 counts for 1 classes",
        ),
        ("confusion.json", '{"classes": ["a"], "matrix": [[1], [2]]}', "should be 1 by 1"),
        ("confusion.json", '{"classes": ["a"], "matrix": 3}', "confusion.json: needs classes and matrix"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    full(tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ReportError, match=re.escape(message)):
        write_report(tmp_path)


def test_a_confusion_matrix_shows_its_counts() -> None:
    drawn = charts.confusion_matrix(["cat", "dog"], [[40, 10], [7, 43]])
    texts = [text.get_text() for text in drawn.axes[0].texts]
    assert texts == ["40", "10", "7", "43"]


def test_a_heat_map_shows_rows_by_client_and_label() -> None:
    drawn = charts.partition_heat_map(["cat", "dog"], {"a": [90, 0], "b": [3, 1]})
    axes = drawn.axes[0]
    assert [text.get_text() for text in axes.texts] == ["90", "3", "1"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a  (90)", "b  (4)"]


def test_the_largest_and_smallest_of_many_clients_are_shown() -> None:
    clients = {str(number): [number, 1] for number in range(300)}
    shown = charts.shown_clients(clients)
    assert len(shown) == 40
    assert (shown[0], shown[-1]) == ("299", "0")
