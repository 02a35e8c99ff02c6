"""The time that a run takes, from the measured seconds of its parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np
import torch
from numpy.typing import NDArray

from fedsmoothlora.config import Config
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.federation.devices import computing
from fedsmoothlora.runs.planning import LoadedModel, Plan, load
from fedsmoothlora.training.loop import autocast, checkpointing, to_device

_MOST_BATCHES = 3


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Measurements of a run on this machine with its threads.

    Attributes:
        loading: seconds until the model is loaded, without costs that only the first run has.
        start: seconds of a client's start, including calibration.
        row: seconds of training on one row.
        upload: seconds of a client's upload.
        aggregate: seconds of the server's aggregation.
        evaluated_row: seconds of evaluating one row.
    """

    loading: float
    start: float
    row: float
    upload: float
    aggregate: float
    evaluated_row: float


def rows_trained(rows: int, steps: int, batch_size: int) -> int:
    """Rows in the first ``steps`` batches of a client; the last batch of each pass may be smaller."""
    a_pass = -(-rows // batch_size)
    return steps // a_pass * rows + min(steps % a_pass * batch_size, rows)


def seconds_of_run(planned: Plan, pace: Pace) -> float:
    """The seconds of a whole run at that pace."""
    once, each_round = _rows_evaluated(planned)
    training = planned.config.training.rounds * _training_of_round(planned, pace)
    evaluated = once + planned.config.training.rounds * each_round
    return pace.loading + training + evaluated * pace.evaluated_row + _personal_at_end(planned, pace)


def seconds_of_round(planned: Plan, pace: Pace) -> float:
    """The seconds of one round at that pace, with its evaluation."""
    return _training_of_round(planned, pace) + _rows_evaluated(planned)[1] * pace.evaluated_row


def _training_of_round(planned: Plan, pace: Pace) -> float:
    config = planned.config
    sizes = _sizes(planned)
    taking_part = config.participation.merged(len(sizes))
    trained = fmean(sum(_rows_of_round(config, size)) for size in sizes)
    visit = pace.start + trained * pace.row + pace.upload
    in_turn = -(-taking_part // config.machine.jobs)  # the others train beside them
    return in_turn * visit + pace.aggregate


def _rows_of_round(config: Config, size: int) -> tuple[int, int]:
    """The rows on which a client of ``size`` rows trains its upload and its personal model in a round."""
    training = config.training
    steps = training.steps_for(size, config.method.calibration.batches)
    personal = (config.personal.steps or steps) if config.personal.on else 0
    return (
        rows_trained(size, steps, training.batch_size),
        rows_trained(size, personal, training.batch_size),
    )


def _personal_at_end(planned: Plan, pace: Pace) -> float:
    """The seconds of personal models after the last round."""
    config, rows = planned.config, sum(map(len, planned.validation.values()))
    steps = config.evaluation.personal_steps
    seconds = rows * pace.evaluated_row * (config.personal.on + (steps is not None))
    if steps is not None:
        sizes = [len(planned.training_rows(client)) for client in planned.validation]
        trained = sum(rows_trained(size, steps, config.training.batch_size) for size in sizes)
        seconds += trained * pace.row
    return seconds / config.machine.jobs


def _rows_evaluated(planned: Plan) -> tuple[float, float]:
    """The rows that are evaluated before the first round, and in each round."""
    config = planned.config
    clients = len(planned.partition.clients)
    taking_part = config.participation.merged(clients)
    validation = sum(map(len, planned.validation.values()))
    test = len(planned.test) if planned.test is not None else 0
    once = test + validation  # the global model's evaluation
    share = taking_part / clients
    if config.method.traits.global_model:
        return once, once + validation * share * (config.evaluation.clients + config.personal.on)
    own = validation * share if config.evaluation.clients or planned.test is None else 0
    return once, taking_part * test + own


def _sizes(planned: Plan) -> list[int]:
    """The numbers of the clients' training rows."""
    return [len(planned.training_rows(client)) for client in planned.partition.clients]


# -- a batch is measured ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MeasuredBatch:
    """The pace of a run by one batch; uploads and averages count as nothing.

    Attributes:
        pace: the pace.
        rows: rows of the measured batch.
        seconds: of its forward and backward pass.
    """

    pace: Pace
    rows: int
    seconds: float


def measure_batch(planned: Plan, limit: float = 2.0) -> MeasuredBatch:
    """Load the model, and measure passes over real rows of the largest client; no weight changes.

    Args:
        planned: the plan.
        limit: seconds to measure training for, and again to measure evaluation for. A batch that would take
            longer is measured by some of its rows; one row is the least.

    Raises ``ConfigError`` if the rows do not fit into memory.
    """
    torch.set_num_threads(planned.config.machine.threads)
    with torch.random.fork_rng(), computing(planned.config.machine):
        return _measured_run(planned, limit)


def _measured_run(planned: Plan, limit: float) -> MeasuredBatch:
    config = planned.config
    began = time.perf_counter()
    loaded = load(planned)
    loading = time.perf_counter() - began
    largest = max(map(planned.training_rows, planned.partition.clients), key=len)
    training = config.training
    size = min(len(largest), planned.rows_at_once)
    evaluation = min(len(largest), config.evaluation.batch_size)
    count, seconds = _measured(_training_pass(planned, loaded), largest[:size], limit)
    evaluated, seconds_evaluated = _measured(_evaluation_pass(planned, loaded), largest[:evaluation], limit)
    row = seconds / count
    calibration = config.method.calibration
    calibrated = fmean(
        rows_trained(rows, calibration.batches, calibration.batch_size or training.batch_size)
        for rows in _sizes(planned)
    )
    pace = Pace(
        loading=loading,
        start=row * calibrated if planned.layers else 0.0,
        row=row,
        upload=0.0,
        aggregate=0.0,
        evaluated_row=seconds_evaluated / evaluated,
    )
    return MeasuredBatch(pace=pace, rows=count, seconds=seconds)


def _measured(
    run: Callable[[NDArray[np.int64]], None], rows: NDArray[np.int64], limit: float
) -> tuple[int, float]:
    """The number of rows that were measured within ``limit``, at most all, and the seconds of one pass."""

    def timed(chosen: NDArray[np.int64]) -> float:
        began = time.perf_counter()
        try:
            run(chosen)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"a batch of {len(chosen)} rows does not fit into memory ({str(error).splitlines()[0]}): "
                "lower training.batch_size, training.tokens_per_batch or evaluation.batch_size, or raise "
                "training.accumulation"
            ) from None
        return time.perf_counter() - began

    seconds = timed(rows[:1])  # slower than later passes
    if seconds > limit:
        return 1, seconds
    began = time.perf_counter()
    count, times = 1, [timed(rows[:1])]
    # Doubled step by step: a pass has costs that do not grow with its rows.
    while count < len(rows) and time.perf_counter() - began + 2 * times[0] <= limit:
        count = min(2 * count, len(rows))
        times = [timed(rows[:count])]
    while len(times) < _MOST_BATCHES and time.perf_counter() - began + times[0] <= limit:
        times.append(timed(rows[:count]))
    return count, median(times)


def _training_pass(planned: Plan, loaded: LoadedModel) -> Callable[[NDArray[np.int64]], None]:
    """Forward and backward pass of training rows, as a client computes them."""
    adapted, training, device = loaded.adapted, planned.config.training, loaded.accelerator.device
    whole = planned.config.method.trains_weights
    examples = planned.task_data.train

    def run(rows: NDArray[np.int64]) -> None:
        adapted.train_only(("W",) if whole else ("B", "A"))
        adapted.model.train()
        with adapted.without_lora() if whole else nullcontext(), checkpointing(adapted.model, training):
            with autocast(training, device):
                loss = loaded.objective.loss(
                    adapted.model, to_device(examples.batch(rows.tolist()), loaded.accelerator)
                )
            loss.backward()
        for parameter in adapted.model.parameters():
            parameter.grad = None
        _finish(device)

    return run


def _evaluation_pass(planned: Plan, loaded: LoadedModel) -> Callable[[NDArray[np.int64]], None]:
    """The forward pass of training rows, as models are evaluated."""
    model, accelerator = loaded.adapted.model, loaded.accelerator
    examples = planned.task_data.train

    def run(rows: NDArray[np.int64]) -> None:
        model.eval()
        with torch.inference_mode(), loaded.adapted.without_lora():
            loaded.objective.loss(model, to_device(examples.batch(rows.tolist()), accelerator))
        _finish(accelerator.device)

    return run


def _finish(device: torch.device) -> None:
    """Wait until the device has computed everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
