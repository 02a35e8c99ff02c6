"""The default folder of a run."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsmoothlora.runs import folders
from fedsmoothlora.runs.folders import default_folder


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


def test_runs_of_one_second_get_folders_of_their_own() -> None:
    made = [default_folder("toy") for _ in range(5)]
    assert len(set(made)) == 5
    assert all(path.is_dir() and path.name.startswith("toy-") for path in made)


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "..", "", "a/b", "a\\b", "x" * 500, "a\0b"])
def test_the_folder_stays_inside_runs(name: str) -> None:
    folder = default_folder(name)
    assert folder.resolve().parent == (Path.cwd() / "runs").resolve()


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=120))
def test_the_folder_of_any_name_is_inside_runs(name: str) -> None:
    folder = default_folder(name)
    assert folder.parent == folders._RUNS
    assert folder.is_dir()
    folder.rmdir()


def test_a_plain_name_is_kept() -> None:
    assert default_folder("my run_1.2").name.startswith("my run_1.2-20")
