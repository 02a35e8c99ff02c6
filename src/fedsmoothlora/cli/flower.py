"""Commands that prepare a federation on several machines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedsmoothlora.cli.app import flower_app, flower_module, interruptible


@flower_app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the app, new or empty.")],
    config: Annotated[
        str, typer.Option(metavar="CONFIG.toml|RECIPE", help="The configuration of all participants.")
    ],
    host: Annotated[
        str, typer.Option(help="Name or address by which sites reach the coordinator.")
    ] = "localhost",
    certificates: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder that `flower certificates` wrote.")
    ] = Path("certificates"),
    port: Annotated[int, typer.Option(help="The coordinator's port.")] = 8000,
    keys: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The sites' public keys, CLIENT.key.pub; every client id is bound to the key of its site.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Replace a value of the configuration; KEY= removes it. Repeatable.",
        ),
    ] = None,
) -> None:
    """Write the coordinator's files: the Flower app, its connection and service files.

    For several sites with data of their own, uploads.clip_to_median and uploads.max_weight are set unless
    CONFIG sets them.

    Example:

    `fedsmoothlora flower init federation --config my.toml --host fl.example.org --keys keys`
    """
    from dataclasses import replace

    from fedsmoothlora.config import Unset, parse_override, read, set_keys
    from fedsmoothlora.errors import ConfigError

    overrides = dict(parse_override(text) for text in set_ or [])
    module = flower_module("app_folder")
    unset = {key for key, value in overrides.items() if isinstance(value, Unset)}
    settings = module.with_defences(read(config, overrides), (set_keys(config) | overrides.keys()) - unset)
    if keys is not None:
        nodes = flower_module("keys").read_fingerprints(keys, settings.flower.clients)
        settings = replace(settings, flower=replace(settings.flower, nodes=nodes))
        try:
            settings.flower.check()
        except ValueError as error:
            raise ConfigError(f"{keys}: {error}") from None
    module.write_app_folder(
        folder, settings, host=host, port=port, certificates=certificates, binary=Path(sys.executable).parent
    )
    Console().print(f"{folder}: the app, flower.env, services/", highlight=False, markup=False)


@flower_app.command()
def run(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that `flower init` wrote.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run's folder, on the coordinator's machine.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A run to resume, in place of --out.")
    ] = None,
    federation_config: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Passed on to `flwr run`, for Flower's simulation.")
    ] = None,
) -> None:
    """Run a federation whose coordinator is running, show its log, and wait for its end.

    The exit code is 0 only if the run was completed.

    Example:

    `fedsmoothlora flower run federation --out runs/xrays`
    """
    if out is not None and resume is not None:
        raise typer.BadParameter("give --out or --resume, not both")
    with interruptible():
        flower_module("submission").run_app(
            folder, out=out, resume=resume, federation_config=federation_config
        )


@flower_app.command()
def certificates(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write to.")],
    host: Annotated[
        list[str], typer.Option(help="Name or address by which sites reach the coordinator; repeatable.")
    ],
) -> None:
    """Write the coordinator's TLS certificate. Copy ca.crt to every site and keep server.key secret.

    Example:

    `fedsmoothlora flower certificates certificates --host fl.example.org`
    """
    flower_module("keys").write_certificates(folder, host)
    Console().print(f"{folder}: ca.crt, server.crt, server.key", highlight=False)


@flower_app.command()
def key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The private key, which stays at the site.")],
) -> None:
    """Write the key of a site. Send FILE.pub to the coordinator, who registers it.

    Example:

    `fedsmoothlora flower key site.key`
    """
    Console().print(
        str(flower_module("keys").write_node_key(file)), highlight=False, markup=False, soft_wrap=True
    )


@flower_app.command()
def trust(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write, which stays at the site.")],
    keys: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="All sites' public keys, CLIENT.key.pub, which the sites gave each other."
        ),
    ],
    fewest: Annotated[
        int | None,
        typer.Option(help="The site's upload is in no sum of fewer sites; unless set, half of them and one."),
    ] = None,
) -> None:
    """Write the sites that a site trusts, for secure aggregation (docs/privacy.md).

    Take the keys from the sites, not from the coordinator: one that chose them could play all other sites.
    Read the fingerprints to each other, for instance on the telephone.

    Example:

    `fedsmoothlora flower trust sites.toml --keys keys`
    """
    found = flower_module("trusted").trusted_sites(keys, fewest)
    found.write(file)
    console = Console()
    for client, key in found.fingerprints.items():
        console.print(f"{client}: {key}", highlight=False, markup=False, soft_wrap=True)
    said = f"{file}: in no sum of fewer than {found.fewest} sites"
    console.print(said, highlight=False, markup=False, soft_wrap=True)
