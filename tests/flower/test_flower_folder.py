"""The folder of a federation, its keys and certificates."""

import ssl
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest
from machines import DEPLOY

from fedsmoothlora.config import read

pytest.importorskip("flwr")
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate

from fedsmoothlora.errors import ConfigError, KeysError
from fedsmoothlora.flower.app_folder import write_app_folder
from fedsmoothlora.flower.keys import write_certificates, write_node_key


@pytest.fixture
def folder(tmp_path: Path, toy_table: dict[str, Any]) -> Path:
    made = tmp_path / "federation"
    write_app_folder(
        made, read(toy_table), host="fl.example.org", certificates=tmp_path / "keys", binary=Path("/usr/bin")
    )
    return made


def test_flower_takes_the_folder_for_an_app_without_dependencies(folder: Path) -> None:
    table, warnings = load_and_validate(folder / "pyproject.toml")
    assert warnings == []
    assert table["project"]["dependencies"] == []


def test_the_app_that_sites_are_sent_is_three_files(folder: Path, tmp_path: Path) -> None:
    import io
    import zipfile

    (folder / "server.key").write_text("secret")
    (folder / "data.csv").write_text("secret")
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder))) as app:
        names = {name for name in app.namelist() if not name.startswith(".info")}
    assert names == {"pyproject.toml", "client_app.py", "server_app.py", "config.toml"}


def test_the_folder_holds_the_whole_configuration(folder: Path, toy_table: dict[str, Any]) -> None:
    assert read(folder / "config.toml") == read(toy_table)
    connection = tomllib.loads((folder / "home/config.toml").read_text())["superlink"]["coordinator"]
    assert connection["address"] == "fl.example.org:8000"
    assert "insecure" not in connection
    assert "--enable-supernode-auth" in (folder / "services/flower-superlink.service").read_text()
    assert "--insecure" not in (folder / "services/flower-supernode.service").read_text()


def test_a_folder_in_use_is_left_alone(folder: Path, tmp_path: Path, toy_table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not empty"):
        write_app_folder(
            folder, read(toy_table), host="x", certificates=tmp_path / "keys", binary=Path("/usr/bin")
        )


def shake_hands(folder: Path, host: str, authority: Path) -> None:
    """A TLS handshake in memory, with the checks that a site's client makes."""
    server_side, client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    server_side.load_cert_chain(folder / "server.crt", folder / "server.key")
    client_side = ssl.create_default_context(cafile=str(authority))
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_side.wrap_bio(up, down, server_side=True)
    client = client_side.wrap_bio(down, up, server_hostname=host)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue


def test_the_certificate_is_good_for_its_hosts_and_no_other(tmp_path: Path) -> None:
    write_certificates(tmp_path / "one", ["fl.example.org", "10.0.0.7"])
    write_certificates(tmp_path / "other", ["fl.example.org"])
    one, other = tmp_path / "one", tmp_path / "other"
    shake_hands(one, "fl.example.org", one / "ca.crt")
    shake_hands(one, "10.0.0.7", one / "ca.crt")
    shake_hands(one, "127.0.0.1", one / "ca.crt")  # the coordinator's own processes
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(one, "elsewhere.example.org", one / "ca.crt")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(one, "fl.example.org", other / "ca.crt")


def test_private_keys_are_for_their_owner_and_are_never_overwritten(tmp_path: Path) -> None:
    write_certificates(tmp_path, ["localhost"])
    public = write_node_key(tmp_path / "site.key")
    for name in ("server.key", "site.key"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert public.read_text().startswith("ecdsa-sha2-nistp384 ")
    before = (tmp_path / "site.key").read_bytes()
    with pytest.raises(KeysError, match=r"site\.key"):
        write_node_key(tmp_path / "site.key")
    with pytest.raises(KeysError, match=r"server\.key"):
        write_certificates(tmp_path, ["localhost"])
    assert (tmp_path / "site.key").read_bytes() == before


def test_the_documented_configuration_is_valid(tmp_path: Path) -> None:
    (text,) = (block.split("```")[0] for block in DEPLOY.read_text(encoding="utf-8").split("```toml\n")[1:])
    (tmp_path / "my.toml").write_text(text, encoding="utf-8")
    assert read(tmp_path / "my.toml").flower.clients == ("hospital-a", "hospital-b", "hospital-c")
