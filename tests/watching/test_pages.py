"""The pages of runs in every state, and the events that keep them up to date."""

import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from starlette.testclient import TestClient
from watched_runs import HOSTILE, add_round, in_progress, make_run

from fedsmoothlora.watching.access import Access
from fedsmoothlora.watching.confined import WatchedFolder
from fedsmoothlora.watching.pages import Pages
from fedsmoothlora.watching.views import RunView


def served(folder: Path) -> TestClient:
    pages = Pages(WatchedFolder(folder), every=0)
    access = Access(host="127.0.0.1", is_local=True, token=None)
    return TestClient(pages.app(access), base_url="http://127.0.0.1:8090")


def shown(folder: Path, run: str = "a") -> str:
    answer = served(folder).get("/run", params={"id": run})
    assert answer.status_code == 200
    return answer.text


def test_a_run_in_progress_shows_its_round_and_the_clients_in_hand(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 1, log="a line of the log")
    in_hand = {"hospital-b": {"step": 3, "steps": 20, "loss": 0.4321}, "hospital-c": {"step": 0, "steps": 20}}
    in_progress(run, round=2, clients=3, done=1, training=2, in_hand=in_hand)
    text = shown(tmp_path)
    for word in ("round 2 of 2", "1 of 3 clients are done, 2 train", "hospital-b", "3 of 20", "0.4321"):
        assert word in text
    for word in ("starting", "a line of the log", "Learning curves", "Bytes by round", "Uploads refused"):
        assert word.lower() in text.lower()
    assert "not finished" not in text


@pytest.mark.parametrize(
    ("rounds", "files", "expected"),
    [
        (2, {}, "finished"),
        (1, {}, "not in progress"),
        (1, {"stopped.json": '{"reason": "no time was left"}'}, "no time was left"),
        (-1, {}, "No round is recorded"),
        (1, {"progress.json": '{"written": 0, "rounds": 2}'}, "has written nothing for"),
        (1, {"progress.json": '{"writ'}, "not in progress"),
        (1, {"config.toml": "name = "}, "cannot be read"),
        (1, {"stopped.json": "[" * 5_000}, "cannot be read as JSON"),
    ],
    ids=["finished", "interrupted", "stopped", "begun", "silent", "half", "damaged", "nested"],
)
def test_states_of_runs(tmp_path: Path, rounds: int, files: dict[str, str], expected: str) -> None:
    run = make_run(tmp_path / "a", rounds)
    for name, content in files.items():
        (run / name).write_text(content, encoding="utf-8")
    assert expected in shown(tmp_path)
    assert "a" in served(tmp_path).get("/").text


def test_texts_of_runs_are_escaped_everywhere(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "<b>a&amp;",
        client=HOSTILE,
        config=f"[data]\nsource = {json.dumps(HOSTILE)}\n",
        log=f"upload refused: {HOSTILE}",
    )
    add_round(run, 3, HOSTILE, refused=1)
    in_hand = {HOSTILE: {"step": 1, "steps": 2, "loss": 0.5}}
    in_progress(run, round=2, clients=1, done=0, training=1, in_hand=in_hand)
    make_run(tmp_path / "other")
    server = served(tmp_path)
    answers = [
        server.get("/run", params={"id": "<b>a&amp;"}),
        server.get("/compare", params={"id": ["<b>a&amp;", "other"]}),
        server.get("/"),
        server.get("/run", params={"id": HOSTILE}),
        server.get("/compare", params={"id": [HOSTILE]}),
    ]
    assert "&lt;script&gt;alert" in answers[0].text
    for answer in answers:
        assert "<script>alert" not in answer.text
        assert "<b>" not in answer.text
        assert "\x1b" not in answer.text
        assert "\u202e" not in answer.text
    assert [answer.status_code for answer in answers] == [200, 200, 200, 404, 404]


def test_a_private_run_shows_neither_its_log_nor_who_takes_part(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 1, config='[privacy]\nunit = "client"\ndelta = 1e-5\n', log="zoe trains")
    add_round(run, 2, epsilon=1.25)
    in_progress(run, round=2)
    text = shown(tmp_path)
    assert "zoe" not in text
    assert "who takes part is not shown" in text
    assert "1.25" in text


def test_a_deleted_run_says_so_and_a_new_one_takes_its_place(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    view = RunView(WatchedFolder(tmp_path), "a")
    stamp, first = view.stamp(), view.page()
    assert first.warning == ""
    shutil.rmtree(run)
    assert view.stamp() != stamp
    gone = view.page()
    assert "deleted" in gone.warning
    assert [section.id for section in gone.sections] == [section.id for section in first.sections]
    make_run(run, 1, planned=4)
    assert view.page().highlights != first.highlights


def test_charts_are_drawn_again_only_when_metrics_change(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    view = RunView(WatchedFolder(tmp_path), "a")
    first = view.page()
    in_progress(run, round=2, clients=1)
    (run / "run.log").write_text("more", encoding="utf-8")
    second = view.page()
    assert first.sections[1:-1] == second.sections[1:-1]
    assert all(one is other for one, other in zip(first.sections[1:-1], second.sections[1:-1], strict=True))
    assert second.sections[-1].blocks != first.sections[-1].blocks


def test_many_runs_are_listed_page_by_page(tmp_path: Path) -> None:
    for number in range(60):
        run = make_run(tmp_path / f"run-{number:03d}", -1)
        os.utime(run / "config.toml", (number, number))
    server = served(tmp_path)
    first, second, third = (server.get("/", params={"page": page}).text for page in (1, 2, 3))
    assert ("run-059" in first, "run-010" in first, "run-009" in first) == (True, True, False)
    assert ("run-009" in second, "run-000" in second, "run-010" in second) == (True, True, False)
    assert "Older runs" in first
    assert "Newer runs" not in first
    assert "There is no run" in third
    for page in ("0", "-1", "x", "9999999", "²"):
        assert server.get("/", params={"page": page}).status_code == 400


def test_runs_side_by_side(tmp_path: Path) -> None:
    make_run(tmp_path / "one", 1)
    make_run(tmp_path / "two", 2)
    server = served(tmp_path)
    text = server.get("/compare", params={"id": ["one", "two"]}).text
    for word in ("one", "two", "1 of 2", "2 of 2", "Accuracy by round", "<svg"):
        assert word in text
    assert server.get("/compare").status_code == 400
    assert server.get("/compare", params={"id": ["one", "../one"]}).status_code == 404
    assert server.get("/compare", params={"id": [str(n) for n in range(11)]}).status_code == 400


def test_the_folder_of_one_run_is_shown_at_once(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    text = served(tmp_path / "a").get("/").text
    assert "All runs" not in text
    assert "events/run?id=" in text
    assert served(tmp_path / "a").get("/run?id=../b").status_code == 404


def test_events_carry_the_parts_that_changed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 1)
    is_over = False
    pages = Pages(WatchedFolder(tmp_path), every=0, is_over=lambda: is_over)

    async def follow() -> None:
        nonlocal is_over
        live = pages.live("a", lambda: RunView(WatchedFolder(tmp_path), "a"))
        events = pages.events(live)
        first = await parts(events)
        assert {"summary", "progress", "curves", "log"} <= first.keys()
        in_progress(run, round=2, clients=1)
        assert (await parts(events)).keys() == {"summary", "progress"}
        _, before = await live.page()
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"round": 2, "client": null, "name": "accuracy", "val')
        assert (await live.page())[1] == before
        with (run / "metrics.jsonl").open("a") as file:
            file.write('ue": 0.8125}\n')
        assert "0.8125" in (await parts(events))["summary"]
        is_over = True
        assert [event async for event in events] == []

    anyio.run(follow)


async def parts(events: AsyncIterator[str]) -> dict[str, str]:
    event = await anext(events)
    head, data, *rest = event.split("\n")
    assert (head, rest) == ("event: parts", ["", ""])
    return dict(json.loads(data.removeprefix("data: ")))


def test_views_that_nobody_asks_for_are_forgotten(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    folder = WatchedFolder(tmp_path)
    pages = Pages(folder)
    kept = [pages.live(number, lambda: RunView(folder, "a")) for number in range(40)]
    assert pages.live(39, lambda: RunView(folder, "a")) is kept[39]
    assert pages.live(0, lambda: RunView(folder, "a")) is not kept[0]
