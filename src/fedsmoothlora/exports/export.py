"""Export a run's model as files that other tools load: whole models and PEFT adapters."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from rich.console import Console

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.errors import ExportError
from fedsmoothlora.exports.adapter import AdapterFacts, save_adapter
from fedsmoothlora.exports.base import Base, whole_modules
from fedsmoothlora.exports.card import Provenance, facts, metrics_of, metrics_over_clients, spent, write_card
from fedsmoothlora.exports.loading import FACTS
from fedsmoothlora.exports.merged import merge
from fedsmoothlora.exports.run_model import RunModel, load_run_model, open_run
from fedsmoothlora.exports.trained import Trained, client_model, global_model
from fedsmoothlora.federation.server import Server
from fedsmoothlora.logs import quiet_libraries
from fedsmoothlora.modeling import precision
from fedsmoothlora.modeling.fingerprint import saved_sha256, weights_sha256
from fedsmoothlora.storage.client_store import StoredStates
from fedsmoothlora.storage.files import is_new_or_empty, write_whole_folder
from fedsmoothlora.storage.run_folder import RunFolder

# The default of vLLM's --max-lora-rank, and its highest value.
_SERVED_BY_DEFAULT, _SERVED_AT_MOST = 16, 512


def export(
    run_dir: str | Path,
    as_: str = "adapter",
    *,
    out: str | Path,
    client: str | None = None,
    round: int | None = None,
    console: Console | None = None,
) -> Path:
    """Write a run's model as files that other tools load.

    ``merged``
        a whole model with all updates merged, and its image processor or tokenizer.
    ``adapter``
        the exact sum of the updates of all rounds, and of the LoRA that the method keeps, as one PEFT LoRA on
        the pretrained model. Its rank is that of the sum.
    ``adapter:RANK``
        the best approximation of at most that rank in each layer (Eckart-Young).

    The folder also contains a model card and ``fedsmoothlora.json`` with the base model, its SHA-256 and, for
    adapters, ranks and relative errors by layer. The data are not needed.

    Args:
        run_dir: the folder of a run, finished or not; its newest checkpoint is exported.
        as_: ``merged``, ``adapter`` or ``adapter:RANK``.
        out: a new or empty folder.
        client: export this client's own model instead of the global one.
        round: export the checkpoint after this many rounds, if it is kept.
        console: where ranks and errors are shown; standard output unless given.

    Returns:
        ``out``.

    Raises:
        ExportError: ``as_`` is not valid, ``out`` is in use, ``run_dir`` is not a run's folder, or no round
            is finished.
        NotKeptError: the method has no such model, or the run did not keep the files that it is made of.
        StateError: no checkpoint can be used, or the base weights or the configuration have changed since
            the run began.
        StorageError: ``out`` cannot be written.
    """
    console, out = console or Console(), Path(out)
    rank = _rank(as_)
    check_new(out)
    folder = open_run(Path(run_dir))
    with quiet_libraries():
        note = partial(_say, console)
        run_model = load_run_model(folder, note, round, of_client=client is not None)
        server = run_model.server
        if client is not None and server.private is not None:
            raise ExportError(
                f"--client {client}: a client's own model is no private release, and this run has "
                "privacy.unit = 'client'; export the global model"
            )
        trained = global_model(server) if client is None else _client(server, folder, client, console)
        adapter = write_export(run_model, trained, as_, out)
    if adapter is not None:
        _print_facts(adapter, console, by_layer=rank is not None)
    _say(console, f"{as_}: {out}")
    return out


def write_export(run_model: RunModel, trained: Trained, as_: str, out: Path) -> AdapterFacts | None:
    """Write one export of a run, as `write_folder`."""
    base = run_model.base()
    config, server, client = run_model.config, run_model.server, trained.client
    personal = client is not None and config.personal.on
    measured = server.round if client is None or personal else server.accepted[client] + 1
    provenance = Provenance(
        name=config.name,
        source=config.model.source,
        # The commit that a branch on the hub pointed to, if there is one.
        revision=getattr(base.model.config, "_commit_hash", None) or config.model.revision,
        data=config.data.source,
        method=config.method.name,
        rounds=server.round,
        planned_rounds=server.rounds,
        clients=len(run_model.partition["clients"]),
        client=client,
        personal=personal,
        metrics=metrics_of(run_model.metrics, measured, client, personal=personal),
        over_clients={} if client is not None else metrics_over_clients(run_model.metrics, measured),
        classes=run_model.classes,
        task=run_model.task,
        kind=config.task.kind,
        prompt=run_model.prompt,
        pad_token_id=getattr(base.model.config, "pad_token_id", None),
        trained_on=precision.described(config.model),
        privacy=spent(server),
        max_value=config.data.max_value or run_model.partition.get("max_value"),
    )
    return write_folder(trained, base, provenance, as_, out)


def write_folder(
    trained: Trained, base: Base, provenance: Provenance, as_: str, out: Path
) -> AdapterFacts | None:
    """Write the files of an export; ``out`` appears whole or not at all.

    Args:
        trained: the model, as its difference from the pretrained one.
        base: the pretrained model, which is modified.
        provenance: the origin of the model.
        as_: ``merged``, ``adapter`` or ``adapter:RANK``.
        out: a new or empty folder.

    Returns:
        The facts of an adapter; None for a whole model.

    Raises:
        ExportError: ``as_`` is not valid, or ``out`` is in use.
        StorageError: ``out`` cannot be written.
    """
    check_new(out)
    rank = _rank(as_)
    without = whole_modules(base, trained.head)
    sha256 = weights_sha256(base.model, without)
    hashes = {"sha256": sha256, "saved_sha256": saved_sha256(base.model, without)}
    with write_whole_folder(out) as folder:
        adapter = None
        if as_ == "merged":
            merge(trained, base.model)
            base.model.save_pretrained(folder)  # type: ignore[operator]
        else:
            adapter = save_adapter(trained, base, folder, rank=rank, revision=provenance.revision)
        base.write_processor(folder)
        table = facts(provenance, as_, hashes, without, adapter)
        (folder / FACTS).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        write_card(provenance, sha256, adapter, base.arguments, folder)
    return adapter


def check_new(out: Path) -> None:
    """Raise ``ExportError`` if ``out`` is a file, or a folder that is not empty."""
    if not is_new_or_empty(out):
        raise ExportError(f"{out} already exists and is not empty: choose another folder")


def _rank(as_: str) -> int | None:
    """The rank of ``adapter:RANK``; None for the other forms."""
    kind, colon, rank = as_.partition(":")
    if as_ in ("merged", "adapter"):
        return None
    if kind == "adapter" and colon and rank.isdecimal() and int(rank) > 0:
        return int(rank)
    raise ExportError(f"--as {as_!r}: write merged, adapter, or adapter:RANK with a rank of at least 1")


def _client(server: Server, folder: RunFolder, client: str, console: Console) -> Trained:
    class Notes(Callback):
        def on_note(self, text: str) -> None:
            _say(console, text)

    states = StoredStates(folder.clients, server.experiment)
    return client_model(server, client, states.load(client, Notes()))


def _print_facts(adapter: AdapterFacts, console: Console, *, by_layer: bool) -> None:
    """Print ranks and errors."""
    if by_layer:
        for name, layer in adapter.layers.items():
            rank, exact, (m, n) = layer.product.rank, layer.exact_rank, layer.product.shape
            error = f"relative error {layer.relative_error:.2e}"
            _say(console, f"  {name} ({m} x {n}): rank {rank} of {exact}, {error}")
    lines = [f"LoRA on {len(adapter.layers)} layers, rank {adapter.rank}"]
    if adapter.whole:
        lines.append(f"whole: {', '.join(adapter.whole)}")
    if adapter.rank < adapter.exact_rank:
        lines.append(f"the exact sum has rank {adapter.exact_rank}")
    if large := [name for name, layer in adapter.layers.items() if _is_large(layer.product)]:
        lines.append(f"on {len(large)} layers it is larger than their weights: --as merged is smaller")
    if adapter.rank > _SERVED_BY_DEFAULT:
        lines.append(
            f"vLLM serves ranks up to {_SERVED_BY_DEFAULT}, or {_SERVED_AT_MOST} with --max-lora-rank"
            + (": this one needs --as adapter:RANK" if adapter.rank > _SERVED_AT_MOST else "")
        )
    _say(console, "; ".join(lines))


def _is_large(product: LowRank) -> bool:
    m, n = product.shape
    return product.rank * (m + n) > m * n


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
