from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedsmoothlora.cli.app import app
from fedsmoothlora.data.packages import cached


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDSMOOTHLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["cache", *arguments])
    assert result.exit_code == 0
    return result.output


def test_the_cache_is_shown_and_cleared(folder: Path) -> None:
    assert "holds nothing" in run()
    for name, size in [("features/a/x", 3_000), ("datasets/csv/rows.arrow", 10), ("mine.txt", 1)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(size))
    lines = [line.split() for line in run().splitlines()]
    assert ["features", "1", "3", "kB"] in [line[:4] for line in lines]
    assert ["datasets", "1", "10"] in [line[:3] for line in lines]
    assert "removed from" in run("--clear")
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    assert "holds nothing" in run()


def test_what_is_computed_from_rows_is_private(folder: Path) -> None:
    def build(empty: Path) -> None:
        (empty / "inner").mkdir()
        (empty / "inner" / "x").touch()

    found = cached("features/a", build, private=True)
    for path in (found.parent, found, found / "inner"):
        assert path.stat().st_mode & 0o777 == 0o700
    assert (found / "inner" / "x").stat().st_mode & 0o777 == 0o600
