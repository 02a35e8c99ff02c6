"""The folder of a federation: the Flower app that is shipped to sites, and what starts it.

====================================  ======================================================================
``pyproject.toml``                    the Flower app: no dependencies, nothing is installed when it runs
``client_app.py``, ``server_app.py``  two lines each: the code is fedsmoothlora's, installed at every site
``config.toml``                       the configuration, every default written out; all sites are sent it
``flower.env``                        telemetry, update check and run-time installation off
``home/config.toml``                  how ``flwr`` reaches the coordinator
``services/``                         systemd units of the coordinator and of a site
====================================  ======================================================================

Only the first three rows are part of the app. Keys and certificates belong somewhere else.
"""

from __future__ import annotations

from pathlib import Path

import tomli_w

from fedsmoothlora.config import Config, to_toml
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.flower.server_app import check_for_sites
from fedsmoothlora.storage.files import write_text

PORT = 8000
CONNECTION = "coordinator"
# Nothing is sent to anyone but the coordinator, and nothing is downloaded.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}

_APP = '''"""The {what}; the code is fedsmoothlora's, the settings are those of config.toml."""

from pathlib import Path

from fedsmoothlora.flower.{module} import {module}

app = {module}(Path(__file__).with_name("config.toml"))
'''

_SUPERLINK = """[Unit]
Description=Coordinator of the federation {name}
After=network-online.target

[Service]
EnvironmentFile={folder}/flower.env
WorkingDirectory={folder}
ExecStart={binary}/flower-superlink --host 0.0.0.0 --port {port} --database {folder}/superlink.db \\
  --ssl-ca-certfile {certificates}/ca.crt --ssl-certfile {certificates}/server.crt \\
  --ssl-keyfile {certificates}/server.key --enable-supernode-auth --disable-runtime-dependency-installation
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
  --node-config 'client-id="{client}" data="/data" state="/var/lib/fedsmoothlora"'
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
        folder: where to; new or empty.
        config: the configuration.
        host: name or address by which sites reach the coordinator.
        port: its port.
        certificates: the folder of ``ca.crt``, ``server.crt`` and ``server.key``.
        binary: the folder of the coordinator's ``flower-superlink``.

    Raises:
        ConfigError: the folder is in use, or the configuration cannot be run by sites.
    """
    check_for_sites(config)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: choose a new folder for the federation")
    folder, certificates = folder.absolute(), certificates.absolute()
    for part in ("home", "services"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    environment = {**QUIET, "FLWR_HOME": str(folder / "home")}
    names = {"name": config.name, "folder": folder, "certificates": certificates, "binary": binary}
    files = {
        "pyproject.toml": tomli_w.dumps(_project(config)),
        "client_app.py": _APP.format(what="ClientApp", module="client_app"),
        "server_app.py": _APP.format(what="ServerApp", module="server_app"),
        "config.toml": to_toml(config),
        "flower.env": "".join(f"{key}={value}\n" for key, value in environment.items()),
        "home/config.toml": tomli_w.dumps(_connection(host, port, certificates / "ca.crt")),
        "services/flower-superlink.service": _SUPERLINK.format(port=port, **names),
        "services/flower-supernode.service": _SUPERNODE.format(
            name=config.name,
            environment="\n".join(f"Environment={key}={value}" for key, value in QUIET.items()),
            address=f"{host}:{port}",
            client=config.flower.clients[0] if config.flower.clients else "0",
        ),
    }
    for name, text in files.items():
        write_text(folder / name, text)


def _project(config: Config) -> dict[str, object]:
    """The app as Flower wants it described; dependencies are each site's own affair, torch's above all."""
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
        }
    }
