"""The live page of a federation, from the coordinator's run folder."""

import json
from pathlib import Path

import pytest

pytest.importorskip("flwr")
from flwr.app import Context, Message
from machines import wait_until
from starlette.testclient import TestClient
from test_flower_engine import Answer, Setting, setting

from fedsmoothlora.watching.access import Access
from fedsmoothlora.watching.confined import WatchedFolder
from fedsmoothlora.watching.pages import Pages

__all__ = ["setting"]  # a fixture


def page(folder: Path) -> str:
    """The page of a run folder, as ``fedsmoothlora watch FOLDER`` serves it."""
    pages = Pages(WatchedFolder(folder.parent), every=0)
    access = Access(host="127.0.0.1", is_local=True, token=None)
    answer = TestClient(pages.app(access), base_url="http://127.0.0.1:8090").get(
        "/run", params={"id": folder.name}
    )
    assert answer.status_code == 200
    return answer.text


@pytest.mark.slow
def test_the_coordinators_folder_is_watched_while_sites_train(setting: Setting) -> None:
    seen: list[str] = []

    progress = setting.root / "runs" / "flower" / "progress.json"

    def look(message: Message, context: Context, app: Answer) -> Message:
        if message.metadata.message_type == "train":
            # A thread of the coordinator writes it once a second.
            now = f"round {len(seen) + 1}"
            wait_until(now, lambda: json.loads(progress.read_text()).get("round") == len(seen) + 1, 60)
            seen.append(page(setting.root / "runs" / "flower"))
        return app(message, context)

    grid = setting.grid({"training.rounds": 2})
    grid.stand_in[11] = look
    (setting.root / "runs").mkdir()
    folder = setting.coordinate(grid, "runs/flower")
    first, second = seen
    assert "round 1 of 2" in first
    assert "round 2 of 2" in second
    for text in (first, second):
        assert "of 3 clients are done" in text
        assert "waiting for 3 clients" not in text
        assert "not in progress" not in text
    finished = page(folder)
    assert "finished" in finished
    for site in ("hospital-a", "hospital-b", "hospital-c"):
        assert site in finished
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    (accuracy,) = (one["value"] for one in lines if (one["round"], one["name"]) == (2, "accuracy"))
    assert f"{accuracy:.4f}" in finished
