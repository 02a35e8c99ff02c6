"""The folder of a federation: the Flower app that sites receive, and the files that start it.

====================================  ======================================================================
``pyproject.toml``                    the Flower app: no dependencies, nothing is installed when it runs
``client_app.py``, ``server_app.py``  two lines each: the code is this package, installed at every site
``config.toml``                       the configuration, every default written out; all sites receive it
``flower.env``                        telemetry, update check and run-time installation off
``home/config.toml``                  how ``flwr`` reaches the coordinator, and Flower's own simulation
``services/``                         systemd units of the coordinator and of a site
====================================  ======================================================================

Only the first three rows are part of the app. Keep keys and certificates elsewhere.
"""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w

from fedsmoothlora.config import Config, read, to_toml
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.flower.server_app import check_for_sites
from fedsmoothlora.printable import printable
from fedsmoothlora.storage.files import write_text

PORT = 8000
CONNECTION = "coordinator"
SIMULATION = "local"
# Flower and Ray contact nobody but the coordinator, and download nothing.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}

_APP = '''"""The {what}; the code is the installed package fedsmoothlora, the settings are in config.toml."""

from pathlib import Path

from fedsmoothlora.flower.{module} import {module}

app = {module}(Path(__file__).with_name("config.toml"))
'''

_SUPERLINK = """[Unit]
Description=Coordinator of the federation {name}
After=network-online.target

[Service]
EnvironmentFile={plain_folder}/flower.env
WorkingDirectory={plain_folder}
ExecStart={superlink} --host 0.0.0.0 --port {port} --database {database} \\
  --ssl-ca-certfile {ca} --ssl-certfile {certificate} \\
  --ssl-keyfile {key} --enable-supernode-auth --disable-runtime-dependency-installation
Restart=on-failure

[Install]
WantedBy=multi-user.target
"""

_SUPERNODE = """[Unit]
Description=Site of the federation {name}
After=network-online.target

[Service]
{environment}
# Change the paths and the client's id to the site's own.
WorkingDirectory=/var/lib/fedsmoothlora
ExecStart=/opt/fedsmoothlora/bin/flower-supernode --superlink {address} \\
  --root-certificates /etc/fedsmoothlora/ca.crt --auth-supernode-private-key /etc/fedsmoothlora/site.key \\
  --node-config {node}
Restart=always
RestartSec=10

[Install]
WantedBy=multi-user.target
"""


def write_app_folder(
    folder: Path, config: Config, *, host: str, port: int = PORT, certificates: Path, binary: Path
) -> None:
    """Write the folder of a federation.

    Args:
        folder: the folder, new or empty.
        config: the configuration.
        host: name or address by which sites reach the coordinator.
        port: the coordinator's port.
        certificates: the folder of ``ca.crt``, ``server.crt`` and ``server.key``.
        binary: the folder of the coordinator's ``flower-superlink``.

    Raises:
        ConfigError: the folder is in use, its path cannot be written into service files, or the configuration
            cannot be run by sites.
    """
    check_for_sites(config)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: choose a new folder for the federation")
    folder, certificates = folder.absolute(), certificates.absolute()
    for path in (folder, certificates, binary):
        if not str(path).isprintable():
            raise ConfigError(f"{printable(str(path))!r}: choose a folder whose name can be printed")
    for part in ("home", "services"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    environment = {**QUIET, "FLWR_HOME": str(folder / "home")}
    name = printable(config.name).replace("%", "%%")
    first = config.flower.clients[0] if config.flower.clients else "0"
    site = {"client-id": first, "data": "/data", "state": "/var/lib/fedsmoothlora"}
    if config.privacy.secure_aggregation:
        site |= {"key": "/etc/fedsmoothlora/site.key", "sites": "/etc/fedsmoothlora/sites.toml"}
    files = {
        "pyproject.toml": tomli_w.dumps(_project(config)),
        "client_app.py": _APP.format(what="ClientApp", module="client_app"),
        "server_app.py": _APP.format(what="ServerApp", module="server_app"),
        "config.toml": to_toml(config),
        # Read by shells and by systemd; both understand the quotes.
        "flower.env": "".join(f"{key}={shlex.quote(value)}\n" for key, value in environment.items()),
        "home/config.toml": tomli_w.dumps(_connection(host, port, certificates / "ca.crt")),
        "services/flower-superlink.service": _SUPERLINK.format(
            name=name,
            plain_folder=str(folder).replace("%", "%%"),
            superlink=_argument(binary / "flower-superlink"),
            port=port,
            database=_argument(folder / "superlink.db"),
            ca=_argument(certificates / "ca.crt"),
            certificate=_argument(certificates / "server.crt"),
            key=_argument(certificates / "server.key"),
        ),
        "services/flower-supernode.service": _SUPERNODE.format(
            name=name,
            environment="\n".join(f"Environment={key}={value}" for key, value in QUIET.items()),
            address=f"{host}:{port}",
            node=_argument(node_config(site)),
        ),
    }
    for file, text in files.items():
        write_text(folder / file, text)


def with_defences(config: Config, chosen: Collection[str] = ()) -> Config:
    """The configuration with defences against malicious sites, where several sites have data of their own.

    ``uploads.clip_to_median`` is set, and ``uploads.max_weight`` to twice a client's mean share, at most 1/2.
    With ``privacy.unit = "client"``, ``privacy.clip_norm`` and equal weights take their place. With secure
    aggregation there are none, because the coordinator sees no single upload. A defence that the method or
    another key refuses is left out.

    Args:
        config: the configuration.
        chosen: dotted keys that the user has set, and that stay as they are.
    """
    if len(config.flower.clients) < 2 or config.privacy.hides_clients or config.privacy.secure_aggregation:
        return config
    in_a_round = config.participation.merged(len(config.flower.clients))
    defences: dict[str, Any] = {"clip_to_median": True}
    if config.server.aggregation not in ("trimmed_mean", "median"):  # they weigh all clients the same
        defences["max_weight"] = min(0.5, 2 / in_a_round)
    if config.privacy.hides_counts:  # all weigh the same
        defences.pop("max_weight", None)
    for key, value in defences.items():
        defended = replace(config, uploads=replace(config.uploads, **{key: value}))
        if f"uploads.{key}" not in chosen and _is_accepted(defended):
            config = defended
    return config


def _is_accepted(config: Config) -> bool:
    try:
        read(tomllib.loads(to_toml(config)))
    except ConfigError:
        return False
    return True


def node_config(values: Mapping[str, str]) -> str:
    """Values as ``--node-config`` and ``--run-config`` take them: ``key="text"``, separated by spaces."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())


def _argument(value: object) -> str:
    """An argument of a command in a systemd unit: in quotes, with nothing in it that systemd expands."""
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + text.replace("%", "%%").replace("$", "$$") + '"'


def _project(config: Config) -> dict[str, object]:
    """The description of the app for Flower. It has no dependencies: every site installs torch by itself."""
    return {
        "project": {
            "name": "fedsmoothlora-federation",
            "version": "1.0.0",
            "description": config.description or config.name,
            "license": "Apache-2.0",
            "dependencies": [],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedsmoothlora",
                    "fab-include": ["/client_app.py", "/server_app.py", "/config.toml"],
                    "components": {"serverapp": "server_app:app", "clientapp": "client_app:app"},
                    "config": {"out": "", "resume": ""},
                }
            }
        },
    }


def _connection(host: str, port: int, ca: Path) -> dict[str, object]:
    return {
        "superlink": {
            "default": CONNECTION,
            CONNECTION: {"address": f"{host}:{port}", "root-certificates": str(ca)},
            SIMULATION: {"address": ":local:"},  # started by ``flwr run``
        }
    }
