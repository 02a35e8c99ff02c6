"""The file of the sites that a site trusts, and the command that writes it."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("flwr")
from fedsmoothlora.cli import app
from fedsmoothlora.config import read
from fedsmoothlora.errors import KeysError
from fedsmoothlora.flower.app_folder import write_app_folder
from fedsmoothlora.flower.keys import write_node_key
from fedsmoothlora.flower.trusted import TrustedSites, trusted_sites
from fedsmoothlora.secure_aggregation.identities import fingerprint

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in NAMES:
        write_node_key(folder / f"{name}.key")
    return folder


def test_the_command_writes_what_a_site_reads_and_shows_the_fingerprints(keys: Path, tmp_path: Path) -> None:
    file = tmp_path / "sites.toml"
    done = CliRunner().invoke(app, ["flower", "trust", str(file), "--keys", str(keys)])
    assert done.exit_code == 0, done.output
    found = TrustedSites.read(file)
    right = {name: fingerprint((keys / f"{name}.key.pub").read_bytes()) for name in NAMES}
    assert (found.fewest, found.fingerprints) == (2, right)
    for name in NAMES:
        assert f"{name}: {right[name]}" in done.output
    assert "in no sum of fewer than 2 sites" in done.output


def test_fewest_and_the_number_of_keys_are_checked(keys: Path, tmp_path: Path) -> None:
    assert trusted_sites(keys, 3).fewest == 3
    for fewest in (1, 4):
        with pytest.raises(KeysError, match=f"fewest is {fewest} of 3 sites; it must be from 2 to all"):
            trusted_sites(keys, fewest)
    with pytest.raises(KeysError, match="has 0 public keys of the form CLIENT"):
        trusted_sites(tmp_path)


RIGHT = "SHA256:" + 43 * "a"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "fewest"),
        ("fewest = 2", "fingerprints"),
        ("fewest = true\n[fingerprints]", "it must have fewest"),
        (f'fewest = 2\nmore = 1\n[fingerprints]\na = "{RIGHT}"', "and nothing else"),
        ('fewest = 2\n[fingerprints]\na = "x"', "fingerprint of a is 'x'"),
        ("fewest = 2\n[fingerprints]\na = 7", "fingerprint of a is 7"),
        (f'fewest = 2\n[fingerprints]\na = "{RIGHT}"\nb = "{RIGHT}"', "that of another site too"),
        (f'fewest = 2\n[fingerprints]\na = "{RIGHT}"', "fewest is 2 of 1 sites"),
        ("fewest = [", "flower trust"),
    ],
    ids=["empty", "keys", "types", "more", "text", "number", "twice", "few", "toml"],
)
def test_another_file_is_refused_with_its_name(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "sites.toml"
    file.write_text(text)
    with pytest.raises(KeysError, match=reason) as caught:
        TrustedSites.read(file)
    assert str(file) in str(caught.value)


def test_the_service_of_a_site_that_masks_names_its_key_and_the_file(tmp_path: Path) -> None:
    table = {
        **{"name": "x", "model": {"source": "x"}, "data": {"source": "/data"}, "method": {"name": "fedit"}},
        **{"flower": {"clients": list(NAMES)}, "privacy": {"secure_aggregation": True}},
    }
    write_app_folder(tmp_path / "app", read(table), host="h", certificates=tmp_path, binary=tmp_path)
    service = (tmp_path / "app/services/flower-supernode.service").read_text()
    assert r"key=\"/etc/fedsmoothlora/site.key\" sites=\"/etc/fedsmoothlora/sites.toml\"" in service
