"""The folder of a federation, its keys and certificates."""

import base64
import hashlib
import re
import shutil
import ssl
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from machines import DEPLOY
from typer.testing import CliRunner

from fedsmoothlora.cli.app import app
from fedsmoothlora.config import read, to_toml

pytest.importorskip("flwr")
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate

from fedsmoothlora.errors import ConfigError, KeysError
from fedsmoothlora.flower.app_folder import write_app_folder
from fedsmoothlora.flower.keys import read_fingerprints, write_certificates, write_node_key
from fedsmoothlora.secure_aggregation.identities import fingerprint


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
    text, masked = (
        block.split("```")[0] for block in DEPLOY.read_text(encoding="utf-8").split("```toml\n")[1:]
    )
    (tmp_path / "my.toml").write_text(text, encoding="utf-8")
    assert read(tmp_path / "my.toml").flower.clients == ("hospital-a", "hospital-b", "hospital-c")
    without = {"uploads", "transport"}  # which need single uploads
    table = {key: value for key, value in tomllib.loads(text).items() if key not in without}
    config = read(table | tomllib.loads(masked))
    assert (config.privacy.secure_aggregation, config.privacy.threshold) == (True, 2)


def test_no_name_of_a_folder_is_executed_or_expanded(tmp_path: Path, toy_table: dict[str, Any]) -> None:
    root = tmp_path / "a $(touch executed) `touch executed` 'b' \"c\" %h"
    folder = root / "federation"
    write_app_folder(
        folder, read(toy_table), host="localhost", certificates=root / "keys", binary=Path("/usr/bin")
    )
    done = subprocess.run(
        ["sh", "-c", 'set -a; . "$1"; printf %s "$FLWR_HOME"', "sh", folder / "flower.env"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == str(folder / "home")
    assert not list(tmp_path.rglob("executed"))
    unit = (folder / "services/flower-superlink.service").read_text()
    (line,) = re.findall(r"--database (.*) \\\n", unit)
    quoted = str(folder / "superlink.db").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    assert line == f'"{quoted}"'


def test_a_folder_whose_name_breaks_lines_is_refused(tmp_path: Path, toy_table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"a\\\\nb"):
        write_app_folder(
            tmp_path / "a\nb", read(toy_table), host="x", certificates=tmp_path, binary=Path("/usr/bin")
        )


def test_a_name_of_a_run_adds_no_line_to_a_service(tmp_path: Path, toy_table: dict[str, Any]) -> None:
    table = {**toy_table, "name": "x\nExecStartPre=/bin/false"}
    write_app_folder(tmp_path / "f", read(table), host="x", certificates=tmp_path, binary=Path("/usr/bin"))
    for unit in (tmp_path / "f" / "services").iterdir():
        assert "\nExecStartPre" not in unit.read_text()


# -- what flower init adds to the configuration -------------------------------------------------------

SITES = ("hospital-a", "hospital-b", "hospital-c", "hospital-d", "hospital-e")


def initialised(tmp_path: Path, table: dict[str, Any], *arguments: str) -> dict[str, Any]:
    """The configuration that ``flower init`` wrote."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "my.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
    folder = tmp_path / "federation"
    done = CliRunner().invoke(
        app, ["flower", "init", str(folder), "--config", str(tmp_path / "my.toml"), *arguments]
    )
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))


def test_init_writes_defences_for_several_sites(tmp_path: Path, toy_table: dict[str, Any]) -> None:
    written = initialised(tmp_path, {**toy_table, "flower": {"clients": SITES}})
    assert written["uploads"]["clip_to_median"] is True
    assert written["uploads"]["max_weight"] == 0.4
    read(written)


def test_init_leaves_what_the_user_has_set(tmp_path: Path, toy_table: dict[str, Any]) -> None:
    table = {**toy_table, "flower": {"clients": SITES}, "uploads": {"clip_to_median": False}}
    uploads = initialised(tmp_path, table, "--set", "uploads.max_weight=0.9")["uploads"]
    assert (uploads["clip_to_median"], uploads["max_weight"]) == (False, 0.9)


def test_no_default_depends_on_the_engine(tmp_path: Path, toy_table: dict[str, Any]) -> None:
    assert initialised(tmp_path, toy_table) == tomllib.loads(to_toml(read(toy_table)))
    assert (
        "max_weight"
        not in initialised(tmp_path / "one", {**toy_table, "flower": {"clients": ["a"]}})["uploads"]
    )


@pytest.mark.parametrize("rule", ["median", "geometric_median"])
def test_the_defences_fit_every_rule_of_aggregation(
    tmp_path: Path, toy_table: dict[str, Any], rule: str
) -> None:
    table = {**toy_table, "flower": {"clients": SITES}, "server": {"aggregation": rule}}
    read(initialised(tmp_path, table))


def test_init_binds_every_client_to_the_key_of_its_site(tmp_path: Path, toy_table: dict[str, Any]) -> None:
    for site in SITES:
        write_node_key(tmp_path / "keys" / f"{site}.key")
    table = {**toy_table, "flower": {"clients": SITES}}
    nodes = initialised(tmp_path, table, "--keys", str(tmp_path / "keys"))["flower"]["nodes"]
    assert list(nodes) == list(SITES)
    for site, fingerprint_ in nodes.items():
        assert fingerprint_ == fingerprint((tmp_path / "keys" / f"{site}.key.pub").read_bytes())
    public = tmp_path / "keys" / "hospital-c.key.pub"
    shutil.copy(tmp_path / "keys" / "hospital-a.key.pub", public)
    with pytest.raises(ConfigError, match=r"keys: .*is the key of another client too"):
        initialised(tmp_path / "again", table, "--keys", str(tmp_path / "keys"))
    public.unlink()
    with pytest.raises(KeysError, match=r"hospital-c\.key\.pub: there is no such file"):
        read_fingerprints(tmp_path / "keys", SITES)


def test_a_fingerprint_is_that_of_flower_s_and_of_openssh_s_format(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    public = write_node_key(tmp_path / "site.key").read_bytes()
    assert re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}", fingerprint(public))
    assert fingerprint(public_key_to_bytes(load_ssh_public_key(public))) == fingerprint(public)
    blob = base64.b64decode(public.split()[1])
    expected = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
    assert fingerprint(public) == f"SHA256:{expected}"
    for wrong in (b"", b"ssh-rsa x", b"-----BEGIN PUBLIC KEY-----\nx"):
        with pytest.raises(KeysError):
            fingerprint(wrong)


KEY, OTHER = f"SHA256:{'a' * 43}", f"SHA256:{'b' * 43}"


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ({"a": KEY}, "flower.nodes has no key of client 'b'"),
        ({"a": KEY, "b": OTHER, "c": f"SHA256:{'c' * 43}"}, "flower.nodes.c: there is no such client"),
        ({"a": KEY, "b": "MD5:00"}, "flower.nodes.b = 'MD5:00' must be the fingerprint"),
        ({"a": KEY, "b": KEY}, "is the key of another client too"),
        ({"a": KEY, "b": 1}, "flower.nodes"),
    ],
)
def test_a_table_of_keys_that_binds_no_id_is_refused(
    toy_table: dict[str, Any], nodes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        read({**toy_table, "flower": {"clients": ["a", "b"], "nodes": nodes}})


def test_the_shipped_apps_are_two_lines_of_code(folder: Path) -> None:
    for name in ("client_app", "server_app"):
        lines = (folder / f"{name}.py").read_text().splitlines()
        assert [line for line in lines if line and not line.startswith(('"""', "from pathlib"))] == [
            f"from fedsmoothlora.flower.{name} import {name}",
            f'app = {name}(Path(__file__).with_name("config.toml"))',
        ]
