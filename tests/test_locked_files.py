"""locked.txt lists the hashes of exactly the versions that constraints.txt names."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
_PIN = re.compile(r"([\w.-]+)==(\S+)")


def _pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(found[1]): found[2] for line in lines if (found := _PIN.match(line))}


def test_both_files_name_the_same_versions() -> None:
    wanted = _pins("constraints.txt")
    assert "torch" in wanted, "`make setup` installs torch by this pin"
    del wanted["torch"]
    assert _pins("locked.txt") == wanted, "run `make lock`"


def test_every_locked_version_has_hashes() -> None:
    text = (ROOT / "locked.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    locked = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"\S+==\S+(\s+--hash=sha256:[0-9a-f]{64})+", line) for line in locked)


def test_locked_versions_fit_the_ranges_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    (dev,) = (one for one in map(Requirement, extras["dev"]) if one.name == project["name"])
    groups = [project["dependencies"], extras["dev"], *(extras[name] for name in dev.extras)]
    needed = [Requirement(text) for group in groups for text in group]
    pins = _pins("constraints.txt")
    for one in needed:
        if one.name != project["name"]:
            assert one.specifier.contains(pins[canonicalize_name(one.name)], prereleases=True), str(one)
