"""An export that is pushed to a hub on this machine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import TOKEN, FakeHub, fake_hub
from huggingface_hub import HfApi
from typer.testing import CliRunner

from conftest import FinishedRuns
from fedsmoothlora import cli
from fedsmoothlora.errors import ExportError, NoExportError
from fedsmoothlora.exports.push import Repository, exported_files, paths_named

WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("NO_PROXY", "*")
    # Xet has a protocol of its own, which no small server speaks; the hub accepts both.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with fake_hub() as hub:
        yield hub


def repository(hub: FakeHub, name: str = "me/toy", token: str = TOKEN) -> Repository:
    return Repository(name, HfApi(endpoint=hub.address, token=token))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# toy\n")
    facts = {"base": {"source": "/home/me/model"}, "data": "pkg:textures", "figures": {"accuracy": 0.5}}
    (folder / "fedsmoothlora.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize("private", [False, True])
def test_the_hub_has_the_files_of_the_export_and_no_other(
    hub: FakeHub, exported: Path, private: bool
) -> None:
    found = repository(hub)
    assert found.check() == "me"
    assert found.push(exported, private=private) == f"{hub.address}/me/toy"
    assert hub.repositories == {"me/toy": private}
    assert hub.files["me/toy"] == {path.name: path.read_bytes() for path in exported.iterdir()}
    assert hub.files["me/toy"]["adapter_model.safetensors"] == WEIGHTS


def test_a_repository_that_exists_is_updated(hub: FakeHub, exported: Path) -> None:
    for text in ("first", "second"):
        (exported / "README.md").write_text(f"---\nlibrary_name: peft\n---\n{text}\n")
        repository(hub).push(exported)
    assert b"second" in hub.files["me/toy"]["README.md"]


def test_nothing_is_sent_unless_it_is_confirmed(hub: FakeHub, exported: Path) -> None:
    shown = []

    def decline(files: object) -> bool:
        shown.append(files)
        return False

    assert repository(hub).push(exported, confirm=decline) is None
    assert shown == [exported_files(exported)]
    assert hub.requests == []


def test_a_public_repository_is_not_taken_for_a_private_one(hub: FakeHub, exported: Path) -> None:
    hub.repositories["me/toy"] = False
    with pytest.raises(ExportError, match="is public, so nothing is pushed"):
        repository(hub).push(exported, private=True)
    assert hub.files == {}
    assert hub.objects == {}


@pytest.mark.parametrize("name", ["train.jsonl", "clients/0/state.bin", "run.log", ".env", "data.parquet"])
def test_files_that_are_no_part_of_an_export_are_never_pushed(
    hub: FakeHub, exported: Path, name: str
) -> None:
    (exported / name).parent.mkdir(parents=True, exist_ok=True)
    (exported / name).write_text("secret")
    with pytest.raises(ExportError, match="no part of an export"):
        repository(hub).push(exported)
    assert hub.requests == []


def test_links_and_folders_of_runs_are_never_pushed(hub: FakeHub, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (exported / "more.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ExportError, match="no part of an export"):
        repository(hub).push(exported)
    with pytest.raises(NoExportError):
        repository(hub).push(Path(__file__).parents[1] / "recorded" / "whole")
    assert hub.requests == []


@pytest.mark.parametrize(
    "path", ["/api/repos/create", "/api/models/me/toy/commit", "/me/toy.git/info", "/objects"]
)
def test_a_refusal_of_the_hub_is_one_line(hub: FakeHub, exported: Path, path: str) -> None:
    hub.refuses = path
    with pytest.raises(ExportError) as error:
        repository(hub).push(exported)
    assert str(error.value).startswith("--push me/toy: the hub refused")
    assert str(error.value).isprintable()
    assert TOKEN not in str(error.value)
    assert hub.files == {}


def test_a_wrong_login_is_noticed_before_the_export(hub: FakeHub) -> None:
    with pytest.raises(ExportError, match="the hub refused"):
        repository(hub, token="hf_wrong").check()


@pytest.mark.parametrize("name", ["a/b/c", "", "../x", "a b", "-x", "x" * 200])
def test_a_name_that_is_none_is_refused_at_once(name: str) -> None:
    with pytest.raises(ExportError, match="--push"):
        Repository(name, HfApi(token=TOKEN))


def test_without_a_login_nothing_is_sent(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ExportError, match="hf auth login"):
        Repository("me/toy", HfApi(endpoint=hub.address))
    assert hub.requests == []


def test_folders_of_this_machine_are_named(exported: Path) -> None:
    assert paths_named(exported) == ["/home/me/model"]


def test_the_command_exports_and_pushes(
    hub: FakeHub,
    toy_table: dict[str, Any],
    finished_runs: FinishedRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = finished_runs.copy(toy_table, {"training.rounds": 1, "training.steps": 2}, tmp_path / "run")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    command = ["export", str(run), "--push", "me/toy", "--yes"]
    done = CliRunner().invoke(cli.app, [*command, "--private"], env={"COLUMNS": "200"})
    assert (done.exit_code, done.stderr) == (0, "")
    pushed = hub.files["me/toy"]
    assert {"README.md", "adapter_model.safetensors", "fedsmoothlora.json"} <= set(pushed)
    assert all(f"  {name} (" in done.stdout for name in pushed)
    assert "they name a folder of this machine" in done.stdout
    assert b"accuracy" in pushed["README.md"]
    assert hub.repositories == {"me/toy": True}
    assert done.stdout.splitlines()[-1] == f"pushed: {hub.address}/me/toy"
    hub.refuses = "/api/whoami"
    done = CliRunner().invoke(cli.app, [*command, "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, ExportError)
    assert not (tmp_path / "out").exists(), "the login is checked first"
