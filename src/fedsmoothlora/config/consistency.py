"""Checks of combinations of keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedsmoothlora import methods
from fedsmoothlora.config.model import Config, Sections
from fedsmoothlora.config.private import privacy_contradictions
from fedsmoothlora.federation.settings import ParticipationSettings, lognormal_sigma
from fedsmoothlora.training.device_names import wrong_name


def contradictions(settings: Sections) -> Iterator[str]:
    """A sentence for every invalid combination of values, with the keys and the remedy."""
    yield from _training(settings)
    yield from _participation(settings)
    yield from _server(settings)
    yield from _aggregation(settings)
    yield from _transport(settings)
    yield from _subspace(settings)
    yield from _scale(settings)
    yield from _scaffold(settings)
    yield from _personal(settings)
    yield from privacy_contradictions(settings)
    yield from _machine(settings)
    if isinstance(settings, Config):
        if settings.tracking.mlflow_uri is not None and not settings.tracking.mlflow:
            yield "tracking.mlflow_uri has no effect unless tracking.mlflow = true"
        if settings.tracking.trackio_space is not None and not settings.tracking.trackio:
            yield "tracking.trackio_space has no effect unless tracking.trackio = true"
        yield from _model(settings)
        try:
            settings.task.check()
        except ValueError as error:
            yield f"task.{error}"
        try:
            settings.flower.check()
        except ValueError as error:
            yield str(error)


def _training(settings: Sections) -> Iterator[str]:
    training = settings.training
    if training.epochs is not None and training.steps is not None:
        yield f"training.epochs = {training.epochs} and training.steps = {training.steps}: give one of them"
    if training.accumulation > training.batch_size:
        yield (
            f"training.accumulation = {training.accumulation} parts of training.batch_size = "
            f"{training.batch_size} rows: each part needs at least one row"
        )
    if training.tokens_per_batch is not None and training.accumulation > 1:
        yield (
            f"training.accumulation = {training.accumulation} and training.tokens_per_batch = "
            f"{training.tokens_per_batch} both cut batches: give one of them"
        )
    if training.momentum is not None and training.optimizer != "sgd":
        yield f"training.momentum = {training.momentum} belongs to training.optimizer = 'sgd'"
    if not any(settings.method.trains_in(round) for round in range(training.rounds)):
        yield (
            f"training.rounds = {training.rounds}: method {settings.method.name!r} trains in none of them, "
            "because it exchanges its start first; use at least 2"
        )
    if training.lr_min > training.lr:
        yield f"training.lr_min = {training.lr_min} is above training.lr = {training.lr}"


def _participation(settings: Sections) -> Iterator[str]:
    participation = settings.participation
    if participation.clients is not None and participation.fraction is not None:
        yield (
            f"participation.clients = {participation.clients} and "
            f"participation.fraction = {participation.fraction}: give one of them"
        )
    yield from _asynchronous(settings) if participation.asynchronous else _synchronous(participation)


def _synchronous(participation: ParticipationSettings) -> Iterator[str]:
    """Keys that belong to asynchronous rounds."""
    unset = ParticipationSettings()
    for key in ("staleness_weight", "max_staleness", "speeds", "replay"):
        if (value := getattr(participation, key)) != getattr(unset, key):
            yield (
                f"participation.{key} = {value!r} belongs to asynchronous rounds: set participation.buffer, "
                "the number of uploads that a round merges, or leave it out"
            )


def _asynchronous(settings: Sections) -> Iterator[str]:
    """Values with which an upload that began in an earlier round has no meaning, or that do nothing."""
    participation, method = settings.participation, settings.method
    buffer = f"participation.buffer = {participation.buffer}"
    if participation.clients is not None and participation.buffer > participation.clients:  # type: ignore[operator]
        yield (
            f"{buffer} is above participation.clients = {participation.clients}, the number of clients that "
            "train at the same time: set it to at most that"
        )
    if not method.traits.asynchronous:
        reason = method.traits.no_async_reason or (
            "it is not known whether its uploads are changes that can be added to a later model "
            "(Traits.asynchronous)"
        )
        yield f"{buffer} does not work with method {method.name!r}: {reason}"
    if method.exchanges_gradients:
        yield (
            f"{buffer} does not work with method {method.name!r} with these options: it exchanges gradients "
            "between the clients of a round, and these begin at different times"
        )
    if settings.lora.client_ranks is not None and method.traits.step_on == "product":
        yield (
            f"{buffer} with lora.client_ranks does not work with method {method.name!r}: the change of an "
            "upload is measured from the server's LoRA, of which clients of a lower rank have only a part"
        )
    if settings.training.scaffold:
        yield (
            f"{buffer} does not work with training.scaffold = true: control variates are differences between "
            "gradients at the same global model"
        )
    if settings.privacy.hides_rows:
        yield (
            f"{buffer} does not work with privacy.unit = 'sample': its noise is computed for one visit of a "
            "client in each round, and clients that still train at the end of a run have one more"
        )
    if settings.privacy.hides_clients:
        yield (
            f"{buffer} does not work with privacy.unit = 'client': accountants know rounds that every client "
            "joins with the same probability, and here fast clients join more of them"
        )
    if reason := personal_reason(settings):
        yield (
            f"{buffer} does not work with {reason}: a personal model deviates from the global model of its "
            "round, and clients that still train hold an older one"
        )
    if settings.evaluation.diagnostics:
        yield (
            f"{buffer} does not work with evaluation.diagnostics = true, which compares the starts of a "
            "round's clients with each other, and these begin at different models"
        )
    yield from _speeds(participation)


def _speeds(participation: ParticipationSettings) -> Iterator[str]:
    speeds = participation.speeds
    if speeds is None:
        return
    if participation.replay is not None:
        yield (
            f"participation.speeds = {speeds!r} and participation.replay = {participation.replay!r}: the "
            "recorded order of arrivals takes the place of speeds; leave one of them out"
        )
    if isinstance(speeds, str) and speeds not in ("equal", "uniform") and lognormal_sigma(speeds) is None:
        yield (
            f"participation.speeds = {speeds!r} must be 'equal', 'uniform', 'lognormal:SIGMA' with SIGMA "
            "above 0 and at most 10, a list of speeds, or a table of them by client"
        )
    values = () if isinstance(speeds, str) else speeds.values() if isinstance(speeds, Mapping) else speeds
    if not all(1e-6 <= speed <= 1e6 for speed in values):
        yield f"participation.speeds = {speeds!r}: a speed must be a number from 1e-6 to 1e6"


def _server(settings: Sections) -> Iterator[str]:
    server, method = settings.server, settings.method
    adaptive = ("adagrad", "adam", "yogi")
    optimizers = {
        "lr": ("momentum", *adaptive),
        "beta1": ("momentum", *adaptive),
        "beta2": ("adam", "yogi"),
        "epsilon": adaptive,
    }
    for key, those in optimizers.items():
        if getattr(server, key) is not None and server.optimizer not in those:
            yield (
                f"server.{key} = {getattr(server, key)} belongs to server.optimizer = "
                f"{' or '.join(map(repr, those))}, not {server.optimizer!r}"
            )
    if server.optimizer == "none":
        return
    if method.traits.step_on is None:
        yield (
            f"server.optimizer = {server.optimizer!r} does not work with method {method.name!r}: "
            f"{method.traits.no_step_reason or 'it has no update that an optimizer could apply'}"
        )
    elif method.feeds_back:
        yield (
            f"server.optimizer = {server.optimizer!r} does not work with method.server_feedback = true, "
            "which measures the truncation of the plain average; switch one of them off"
        )


def _aggregation(settings: Sections) -> Iterator[str]:
    server, method = settings.server, settings.method
    rule = f"server.aggregation = {server.aggregation!r}"
    counted = ("multi_krum", "trimmed_mean")
    if server.byzantine is not None and server.aggregation not in counted:
        yield (
            f"server.byzantine = {server.byzantine} belongs to server.aggregation = "
            f"{' or '.join(map(repr, counted))}, not {server.aggregation!r}"
        )
    if server.byzantine is None and server.aggregation in counted:
        yield f"{rule} needs server.byzantine: the largest number of malicious clients, for instance 1"
    averages = method.sends(0) != "nothing"
    if settings.uploads.max_weight is not None and averages and method.traits.no_robust_reason:
        yield (
            f"uploads.max_weight = {settings.uploads.max_weight} does not work with method {method.name!r}: "
            f"{method.traits.no_robust_reason}"
        )
    if server.aggregation == "mean":
        return
    if settings.training.scaffold:
        yield f"{rule} does not work with training.scaffold = true, whose control variates need the mean"
    reason = method.traits.no_robust_reason
    if server.aggregation in ("trimmed_mean", "median"):
        reason = reason or method.traits.no_coordinates_reason
    if settings.uploads.max_weight is not None and server.aggregation != "geometric_median":
        yield f"{rule} uses no sample counts: leave uploads.max_weight out"
    if reason:
        yield f"{rule} does not work with method {method.name!r}: {reason}"


def _transport(settings: Sections) -> Iterator[str]:
    bits, method = settings.transport.bits, settings.method
    if bits == 32:
        return
    if reason := method.traits.float32_reason or (_no_packed_reason(method) if bits < 16 else ""):
        yield (
            f"transport.bits = {bits} does not work with method {method.name!r}: {reason}; use "
            f"{'32' if method.traits.float32_reason else '16 or 32'}"
        )
    if not settings.lora.target_modules:
        yield (
            f"transport.bits = {bits} is the format of LoRA factors, and there are none: lora.target_modules "
            "is empty; use 32"
        )


def _subspace(settings: Sections) -> Iterator[str]:
    """Keys that need single uploads, where the server uses sums of two exchanges only."""
    if not settings.method.two_exchanges:
        return
    server, uploads = settings.server, settings.uploads
    subspace = "does not work with method.exchange = 'subspace'"
    if settings.transport.bits != 32:
        yield (
            f"transport.bits = {settings.transport.bits} {subspace}: coded numbers can be summed only with "
            "scales that all clients share, which this version does not have; use 32"
        )
    if settings.lora.client_ranks is not None:
        yield f"lora.client_ranks {subspace}: all clients have the columns of one subspace; leave it out"
    if settings.participation.asynchronous:
        yield (
            f"participation.buffer = {settings.participation.buffer} {subspace}: the clients of a sum begin "
            "in the same round; leave it out"
        )
    if server.aggregation != "mean":
        yield (
            f"server.aggregation = {server.aggregation!r} {subspace}: it compares single uploads, and the "
            "server uses their sum only; use 'mean'"
        )
    if uploads.max_weight is not None:
        yield (
            f"uploads.max_weight = {uploads.max_weight} {subspace}: clients multiply their uploads by their "
            "weights themselves; leave it out"
        )
    if uploads.clip_to_median:
        yield (
            f"uploads.clip_to_median = true {subspace}: a client keeps for its next upload what the one it "
            "sent leaves out, and does not learn that the server scaled it; leave it out"
        )
    if server.optimizer != "none":
        yield (
            f"server.optimizer = {server.optimizer!r} {subspace}: the next subspace follows from the sum of "
            "the uploads, which the optimizer would change; use 'none'"
        )
    if settings.privacy.hides_clients:
        instead = (
            "a method that averages factors, such as 'fedit'"
            if settings.privacy.secure_aggregation
            else "method.exchange = 'product'"
        )
        yield (
            f"privacy.unit = 'client' {subspace}: each round has two releases, and this version has noise "
            f"for one only; use {instead}"
        )


def _no_packed_reason(method: methods.Method) -> str:
    """The reason why a method's uploads cannot be packed."""
    if method.traits.packed_reason:
        return method.traits.packed_reason
    if method.sends(0) != "product" and not method.traits.averages_factors:
        return "its factors are neither products nor averaged, so that there is no change of them to send"
    if method.exchanges_gradients:
        return "it sends whole gradients, which are not coded, so few bits for the rest would save little"
    return ""


def _scale(settings: Sections) -> Iterator[str]:
    if settings.lora.scale is not None and settings.lora.use_rslora:
        yield (
            f"lora.scale = {settings.lora.scale!r} and lora.use_rslora = true are two scales; leave one out"
        )


def _scaffold(settings: Sections) -> Iterator[str]:
    training, method = settings.training, settings.method
    if not training.scaffold:
        return
    if method.trains_weights and not method.traits.stable_parameters:
        yield (
            f"training.scaffold = true does not work with {method.weights_setting}: the server merges a "
            "part of the clients' changes, and control variates are for the whole; use method.name = 'full'"
        )
    elif not method.traits.stable_parameters:
        lasting = methods.with_trait("stable_parameters")
        yield (
            f"training.scaffold = true does not work with method {method.name!r}: its trained parameters, "
            f"and so their control variates, change their meaning in every round; use "
            f"{', '.join(lasting[:-1])} or {lasting[-1]}"
        )
    if training.optimizer != "sgd" or training.momentum != 0 or training.max_grad_norm is not None:
        yield (
            "training.scaffold = true computes gradients from the steps of plain SGD: it needs "
            "training.optimizer = 'sgd', training.momentum = 0 and no training.max_grad_norm"
        )
    if training.head_lr is not None:
        yield (
            f"training.head_lr = {training.head_lr:g} does not work with training.scaffold = true, which "
            "computes gradients from steps of one learning rate: leave one of them out"
        )


def _machine(settings: Sections) -> Iterator[str]:
    machine = settings.machine
    if (reason := wrong_name(machine.device)) is not None:
        yield f"machine.device = {machine.device!r}: {reason}"
    keep = f"machine.keep_weights = {machine.keep_weights!r}"
    if machine.keep_weights == "device" and machine.device == "cpu":
        yield f"{keep} needs an accelerator, and machine.device = 'cpu': use 'host' or 'disk'"
    if machine.keep_weights != "auto" and not settings.lora.target_modules:
        yield f"{keep}: lora.target_modules is empty, so no pretrained weights are copied: leave it out"
    if machine.device == "cpu":
        device = "and machine.device = 'cpu': leave it out, or use another device"
        if machine.deterministic:
            yield f"machine.deterministic = true is for NVIDIA GPUs, {device}"
        if machine.tf32 is not None:
            yield f"machine.tf32 = {str(machine.tf32).lower()} is for NVIDIA GPUs, {device}"
    if machine.compile:
        yield from _compile(settings)

    if machine.batch_clients > 1:
        for reason in _apart(settings):
            yield f"machine.batch_clients = {machine.batch_clients}: {reason}; leave it at 1"


def _compile(settings: Sections) -> Iterator[str]:
    """Keys with which the compiled forward pass would be compiled for every client, or not be called."""
    key = "machine.compile = true"
    if settings.machine.jobs > 1:
        yield (
            f"{key} and machine.jobs = {settings.machine.jobs}: every client has a process of its own, which "
            "would compile the model again: leave one of them out"
        )
    if settings.training.gradient_checkpointing:
        yield (
            f"{key} and training.gradient_checkpointing = true: the compiler decides itself which values to "
            "compute again: leave one of them out"
        )
    if settings.privacy.hides_rows:
        yield (
            f"{key} and privacy.unit = 'sample': hooks in the model compute the gradients of single rows, "
            "and a compiled model does not call them: leave machine.compile out"
        )


def _apart(settings: Sections) -> Iterator[str]:
    """Every reason why clients cannot be trained in one forward pass."""
    machine, training, method = settings.machine, settings.training, settings.method
    sent = {method.sends(round) for round in range(training.rounds) if method.trains_in(round)}
    if machine.jobs > 1:
        yield f"with machine.jobs = {machine.jobs} every client trains in a process of its own"
    if method.trains_weights:
        yield f"{method.weights_setting} trains the weights, of which every client would need a copy"
    if "R" in sent:
        yield (
            f"method {method.name!r} trains a matrix between the LoRA factors, and clients that train "
            "together train the factors"
        )
    if training.scaffold:
        yield "training.scaffold = true corrects the gradients of one client at a time"
    if training.precision != "fp32":
        yield (
            f"training.precision = {training.precision!r} rounds the backbone and a client's shift of it "
            "apart from each other, so results would differ by more than the rounding of float32"
        )
    if settings.privacy.hides_rows:
        yield (
            "privacy.unit = 'sample' clips the gradient of every row of one client at a time, and draws its "
            "noise"
        )
    if settings.participation.asynchronous:
        yield f"participation.buffer = {settings.participation.buffer}: clients begin at different times"
    if machine.compile:
        yield "machine.compile = true compiles the model without the clients' branches"


def personal_reason(settings: Sections) -> str:
    """The key that asks for personal models, with its value; empty if none does."""
    personal, steps = settings.personal, settings.evaluation.personal_steps
    if personal.ditto is not None:
        return f"personal.ditto = {personal.ditto:g}"
    return f"evaluation.personal_steps = {steps}" if steps is not None else ""


def _personal(settings: Sections) -> Iterator[str]:
    personal, method, steps = settings.personal, settings.method, settings.evaluation.personal_steps
    if personal.steps is not None and not personal.on:
        yield f"personal.steps = {personal.steps} belongs to personal.ditto, the weight lambda; set both"
    asked = [f"personal.ditto = {personal.ditto:g}"] if personal.ditto is not None else []
    asked += [f"evaluation.personal_steps = {steps}"] if steps is not None else []
    for key in asked:
        if not method.traits.global_model:
            yield (
                f"{key} does not work with method {method.name!r}: there is no global model to begin from, "
                "and its clients have models of their own; evaluation.clients = true evaluates these"
            )
    if personal.on and settings.lora.client_ranks is not None:
        yield (
            f"{asked[0]} does not work with lora.client_ranks: a client of a lower rank may not receive the "
            "whole global model, from which its personal model deviates; leave lora.client_ranks out"
        )


def _model(config: Config) -> Iterator[str]:
    model, lora, method = config.model, config.lora, config.method
    task = config.task
    if config.training.class_weights is not None and not (task.classifies or task.weighs_labels):
        yield (
            f"training.class_weights belongs to tasks that classify, and task.kind = {task.kind!r} has no "
            "classes: leave it out"
        )
    best, patience = config.checkpoint.best, config.training.patience
    if best not in task.measured:
        scores = " and the metrics of task.scores" if best in task.metrics else ""
        yield (
            f"checkpoint.best = {best!r} is not measured by task.kind = {task.kind!r}, "
            f"which measures {', '.join(task.measured)}{scores}"
        )
    every = getattr(task, "metric_every", None)
    if patience is not None and best in task.costly and not 0 < (every or 0) <= patience:
        yield (
            f"training.patience = {patience} ends a run after {patience} rounds without a better "
            f"checkpoint.best = {best!r}, which is not measured that often: set task.metric_every to at most "
            f"{patience}"
        )
    if lora.head_r is not None and model.head == "full":
        yield (
            f"lora.head_r = {lora.head_r} belongs to model.head = 'lora': a head that is trained whole has "
            "no LoRA"
        )
    if config.training.head_lr is not None and model.head == "lora":
        yield (
            f"training.head_lr = {config.training.head_lr:g} belongs to a head that is trained whole, and "
            "model.head = 'lora' does not train one: leave the key out, or train a classifier's head whole "
            "with model.head = 'full'"
        )
    if not lora.target_modules and model.head != "full":
        yield (
            "lora.target_modules is empty and model.head = 'lora': nothing would be trained; name layers to "
            "adapt, or set model.head = 'full'"
        )
    if (key := model.untouched_by) and method.trains_weights:
        yield (
            f"{key} never changes the pretrained weights, but {method.weights_setting} trains them: "
            "remove that key, or train a LoRA"
        )
    if model.attention == "flash_attention_2":
        if model.dtype != "bfloat16":
            yield (
                f"model.attention = 'flash_attention_2' computes in bfloat16 only, and model.dtype = "
                f"{model.dtype!r}: set model.dtype = 'bfloat16', or model.attention = 'sdpa'"
            )
        if config.machine.device == "cpu":
            yield (
                "model.attention = 'flash_attention_2' needs a GPU with CUDA, and machine.device = 'cpu': "
                "set model.attention = 'sdpa'"
            )
    if key and config.machine.keep_weights != "auto":
        yield (
            f"machine.keep_weights = {config.machine.keep_weights!r}: {key} never changes the pretrained "
            "weights, so they are not copied: leave it out"
        )
    if config.machine.compile and key:
        yield (
            f"machine.compile = true: with {key}, the updates of all rounds are computed beside the layers, "
            "and their shape changes with rounds and clients, so the model would be compiled again and "
            "again: leave one of them out"
        )
    if config.machine.compile and (frozen := getattr(task, "frozen_features", None)) is not None:
        yield (
            f"machine.compile = true: with task.frozen_features = {frozen!r} only a small head is trained: "
            "leave machine.compile out"
        )
    if config.machine.deterministic and model.attention == "flash_attention_2":
        yield (
            "machine.deterministic = true: the gradients of model.attention = 'flash_attention_2' are sums "
            "in no fixed order: set model.attention = 'sdpa' or 'eager'"
        )
