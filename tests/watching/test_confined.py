"""Only files of runs below the folder are read."""

import os
from pathlib import Path

import pytest
from watched_runs import make_run

from fedsmoothlora.errors import ConfigError, NoRunError
from fedsmoothlora.watching.confined import WatchedFolder


@pytest.mark.parametrize(
    "run",
    [
        "..",
        ".",
        "../outside",
        "a/../a",
        "a/..",
        "/a",
        "a/",
        "a//b",
        "a\0",
        "no",
        "a/config.toml",
        "a" * 5_000,
    ],
    ids=range(12),
)
def test_paths_that_lead_elsewhere_are_refused(tmp_path: Path, run: str) -> None:
    make_run(tmp_path / "watched" / "a")
    make_run(tmp_path / "outside")
    with pytest.raises(NoRunError), WatchedFolder(tmp_path / "watched").open_run(run):
        pass


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside = make_run(tmp_path / "outside" / "secret", log="a secret")
    run = make_run(tmp_path / "watched" / "a")
    (tmp_path / "watched" / "link").symlink_to(outside)
    (tmp_path / "watched" / "above").symlink_to(tmp_path / "outside")
    (run / "run.log").unlink()
    (run / "run.log").symlink_to(outside / "run.log")
    folder = WatchedFolder(tmp_path / "watched")
    assert folder.runs() == ["a"]
    for name in ("link", "above/secret"):
        with pytest.raises(NoRunError), folder.open_run(name):
            pass
    with folder.open_run("a") as files:
        assert files.open("run.log") is None
        with pytest.raises(FileNotFoundError):
            files.opener("run.log", os.O_RDONLY)


def test_only_regular_files_of_a_sensible_size_are_opened(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run / "run.log").unlink()
    os.mkfifo(run / "run.log")
    (run / "stopped.json").mkdir()
    with (run / "confusion.json").open("wb") as file:
        file.truncate(1 << 30)
    with WatchedFolder(tmp_path).open_run("a") as files:
        for name in ("run.log", "stopped.json", "confusion.json", "none"):
            assert files.read(name) is None
        assert files.read("environment.json") == b'{"experiment": "1"}'


def test_no_file_stays_open(tmp_path: Path) -> None:
    folder = WatchedFolder(make_run(tmp_path / "a"))
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0
    for run in ("", "no", "..") * 5:
        try:
            with folder.open_run(run) as files:
                files.read("config.toml")
                files.read("no")
        except NoRunError:
            pass
    after = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0
    assert before == after


def test_runs_are_found_below_the_folder_the_newest_first(tmp_path: Path) -> None:
    for number, name in enumerate(["old", "grid/runs/fedit/seed-0", "new", ".hidden/a", "old/inside"]):
        os.utime(make_run(tmp_path / name) / "config.toml", (number, number))
    (tmp_path / "no-run").mkdir()
    (tmp_path / "no-run" / "config.toml").touch()
    folder = WatchedFolder(tmp_path)
    assert folder.runs() == ["new", "grid/runs/fedit/seed-0", "old"]
    assert not folder.is_run
    assert WatchedFolder(tmp_path / "old").is_run


def test_a_folder_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        WatchedFolder(tmp_path / "no")
