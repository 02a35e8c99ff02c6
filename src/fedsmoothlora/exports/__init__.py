"""A run's result as files that other tools load: whole models, and PEFT adapters."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsmoothlora.adapters import find_layers
from fedsmoothlora.config import Config, read
from fedsmoothlora.exports.adapter import AdapterFacts, save_adapter
from fedsmoothlora.exports.base import Base, load_base, task_of, weights_sha256, whole_modules
from fedsmoothlora.exports.card import About, about, facts, write_card
from fedsmoothlora.exports.loading import FACTS
from fedsmoothlora.exports.merged import merge
from fedsmoothlora.exports.trained import NotKeptError, Trained, client_model, global_model
from fedsmoothlora.logs import quiet_libraries
from fedsmoothlora.models import load_image_classifier
from fedsmoothlora.origin import Origin
from fedsmoothlora.restoring import restore_server
from fedsmoothlora.run_folder import RunFolder
from fedsmoothlora.server import Server
from fedsmoothlora.state import Checkpoints, StoredStates
from fedsmoothlora.watching import Watcher

# What vLLM's --max-lora-rank is unless set, and the most that it can be.
_SERVED_BY_DEFAULT, _SERVED_AT_MOST = 16, 512


class ExportError(ValueError):
    """An export that cannot be made: says what is wrong with the request or the folder."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run at a checkpoint, as far as its model is concerned.

    Attributes:
        config: the run's.
        server: as the checkpoint has it.
        partition: what ``partition.json`` says.
        metrics: the lines of ``metrics.jsonl``.
    """

    config: Config
    server: Server
    partition: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels."""
        return tuple(self.partition["classes"])

    def base(self) -> Base:
        """The pretrained model, a fresh copy."""
        return load_base(self.config, self.classes)


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
        a whole model, every update merged, with its image processor or tokenizer.
    ``adapter``
        the exact sum of all rounds (and the method's own LoRA on top) as one PEFT LoRA on the untouched
        pretrained model, of the rank that the sum has.
    ``adapter:RANK``
        the best approximation of at most that rank in each layer (Eckart-Young).

    Beside each stand a model card and ``fedsmoothlora.json``: base model and its SHA-256, and for adapters
    ranks and relative errors by layer. The data need not be at hand.

    Args:
        run_dir: the folder of a run, finished or not; its newest checkpoint counts.
        as_: ``merged``, ``adapter`` or ``adapter:RANK``.
        out: a new or empty folder.
        client: export this client's own model in place of the global one.
        round: take the checkpoint after this many rounds (those that are kept).
        console: where ranks and errors are shown; standard output unless given.

    Returns:
        ``out``.

    Raises:
        ExportError: ``as_`` is none of these, ``out`` is in use, or ``run_dir`` is not a run's folder.
        NotKeptError: the method has no such model, or what it would be made of was not kept.
        StateError: no checkpoint can be used.
    """
    console, out = console or Console(), Path(out)
    rank = _rank(as_)
    check_new(out)
    folder = _opened(Path(run_dir))
    with quiet_libraries():
        outcome = load_outcome(folder, console, round)
        server = outcome.server
        trained = global_model(server) if client is None else _client(server, folder, client, console)
        adapter = write_export(outcome, trained, as_, out)
    if adapter is not None:
        _tell(adapter, console, by_layer=rank is not None)
    console.print(f"{as_}: {out}", highlight=False, markup=False, soft_wrap=True)
    return out


def load_outcome(folder: RunFolder, console: Console, round: int | None = None) -> Outcome:
    """A run's model as its newest checkpoint has it; neither data nor weights are loaded.

    Raises ``ExportError``, ``StateError``: as `export`.
    """
    config = _config(folder)
    partition = folder.read_json("partition.json")
    empty = load_image_classifier(config.model, partition["classes"], config.seed, empty=True)
    layers = find_layers(
        empty.model, config.lora, empty.head, head_is_trained_whole=config.model.head == "full"
    )

    def pretrained(name: str) -> Any:
        raise NotKeptError(f"method {config.method.name!r} needs the pretrained weights of {name} here")

    server = Server(
        method=config.method,
        layers=layers,
        origin=Origin(layers, config.seed, pretrained),
        rounds=config.training.rounds,
        head={},
    )
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
    if (
        restore_server(server, folder, checkpoints, lambda note: console.print(note, markup=False), round)
        is None
    ):
        raise ExportError(f"{folder.path} has no checkpoint yet: nothing was trained")
    return Outcome(config=config, server=server, partition=partition, metrics=folder.metrics())


def write_export(outcome: Outcome, trained: Trained, as_: str, out: Path) -> AdapterFacts | None:
    """Write one export of a run, as `write_folder`."""
    base = outcome.base()
    task = task_of(base.model)
    if task is None:
        raise ExportError(f"{type(base.model).__name__} is no kind of model that can be exported")
    server, client = outcome.server, trained.client
    origin = about(
        outcome.config,
        task=task,
        # The commit that a branch of a hub stood for, where there is one.
        revision=getattr(base.model.config, "_commit_hash", None) or outcome.config.model.revision,
        classes=outcome.classes,
        clients=len(outcome.partition["clients"]),
        rounds=server.round,
        metrics=outcome.metrics,
        client=client,
        measured=server.round if client is None else server.accepted[client] + 1,
    )
    return write_folder(trained, base, origin, as_, out)


def write_folder(trained: Trained, base: Base, origin: About, as_: str, out: Path) -> AdapterFacts | None:
    """Write the files of an export; ``out`` appears whole or not at all.

    Args:
        trained: the model, as its difference from the pretrained one.
        base: the pretrained one; it is used up.
        origin: where it comes from.
        as_: ``merged``, ``adapter`` or ``adapter:RANK``.
        out: new or empty.

    Returns:
        What there is to say of an adapter; None for a whole model.

    Raises:
        ExportError: ``as_`` is none of these, or ``out`` is in use.
    """
    check_new(out)
    rank = _rank(as_)
    without = whole_modules(base, trained.head)
    sha256 = weights_sha256(base.model, without)
    with _whole_folder(out) as folder:
        adapter = None
        if as_ == "merged":
            merge(trained, base.model)
            base.model.save_pretrained(folder)  # type: ignore[operator]
        else:
            adapter = save_adapter(trained, base, folder, rank=rank, revision=origin.revision)
        base.write_processor(folder)
        table = facts(origin, as_, sha256, without, adapter)
        (folder / FACTS).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        write_card(origin, sha256, adapter, base.arguments, folder)
    return adapter


def check_new(out: Path) -> None:
    """Raise ``ExportError`` if there is something in a folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} already exists and is not empty: choose another folder")


def _rank(as_: str) -> int | None:
    """The rank of ``adapter:RANK``; None where there is none."""
    kind, colon, rank = as_.partition(":")
    if as_ in ("merged", "adapter"):
        return None
    if kind == "adapter" and colon and rank.isdecimal() and int(rank) > 0:
        return int(rank)
    raise ExportError(f"--as {as_!r}: write merged, adapter, or adapter:RANK with a rank of at least 1")


def _opened(path: Path) -> RunFolder:
    try:
        return RunFolder.open(path)
    except FileNotFoundError as error:
        raise ExportError(str(error)) from None


def _config(folder: RunFolder) -> Config:
    """The run's configuration."""
    if not (folder.path / "partition.json").is_file():
        raise ExportError(
            f"the run in {folder.path} was made by Federation(...) in Python, from a model that is in no "
            "file: there, federation.model() and federation.save_adapter(DIR) give what it came to"
        )
    return read(folder.path / "config.toml")


def _client(server: Server, folder: RunFolder, client: str, console: Console) -> Trained:
    class Told(Watcher):
        def note(self, text: str) -> None:
            console.print(text, markup=False, soft_wrap=True)

    states = StoredStates(folder.clients, server.experiment)
    return client_model(server, client, states.load(client, Told()))


def _tell(adapter: AdapterFacts, console: Console, *, by_layer: bool) -> None:
    """Ranks and errors, for people."""
    if by_layer:
        table = Table("layer", "shape", "exact rank", "rank", "relative error", box=None, pad_edge=False)
        for name, layer in adapter.layers.items():
            m, n = layer.product.shape
            table.add_row(
                name,
                f"{m} x {n}",
                str(layer.exact_rank),
                str(layer.product.rank),
                f"{layer.relative_error:.2e}",
            )
        console.print(table)
    lines = [f"LoRA on {len(adapter.layers)} layers, rank {adapter.rank}"]
    if adapter.whole:
        lines.append(f"whole: {', '.join(adapter.whole)}")
    if adapter.rank < adapter.exact_rank:
        lines.append(f"the exact sum has rank {adapter.exact_rank}")
    if adapter.rank > _SERVED_BY_DEFAULT:
        lines.append(
            f"vLLM serves ranks up to {_SERVED_BY_DEFAULT} unless --max-lora-rank says otherwise, "
            f"{_SERVED_AT_MOST} at most"
            + (": this one needs --as adapter:RANK" if adapter.rank > _SERVED_AT_MOST else "")
        )
    console.print("; ".join(lines), highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out``, which takes its name when the block ends well."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        temporary.mkdir()
        yield temporary
        if out.is_dir():  # empty
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
