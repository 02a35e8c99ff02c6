"""`python -m benchmarks`: run benchmarks, print a line of JSON each, and write docs/performance.md."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from benchmarks import (
    algebra,
    batched_clients,
    calibration,
    coding,
    directions,
    feedback,
    flower_messages,
    generation,
    jobs,
    many_clients,
    memory,
    population,
    quantized,
    secure,
    sketches,
    start_up,
    training,
    transport,
    unused,
    whole_run,
    wire,
)
from benchmarks.rows import Row
from benchmarks.tables import write_table

BENCHMARKS: dict[str, Callable[[], Iterable[Row]]] = {
    "algebra-vit": lambda: algebra.rows("ViT-S"),
    "algebra-llama": lambda: algebra.rows("Llama-3.2-1B"),
    "coding": coding.rows,
    "calibration-vit": lambda: calibration.rows("vit"),
    "directions": directions.rows,
    "feedback": feedback.rows,
    "sketches": sketches.rows,
    "sketched-runs": sketches.run_rows,
    "rounds": lambda: training.rows("rounds"),
    "batched-clients": batched_clients.rows,
    "rounds-text": lambda: training.rows("rounds-text"),
    "unused": unused.rows,
    "memory": memory.rows,
    "wire": wire.rows,
    "flower-messages": flower_messages.rows,
    "quantized": quantized.rows,
    "secure": secure.rows,
    "transport": transport.rows,
    "many-clients": many_clients.rows,
    "population": population.rows,
    "quickstart": whole_run.rows,
    "start-up": start_up.rows,
    "generation": generation.rows,
    "jobs": jobs.rows,
}


def main() -> None:
    """Run the chosen benchmarks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=list(BENCHMARKS), help="one benchmark; may be repeated"
    )
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--page", type=Path, default=Path("docs/performance.md"), help="the page whose tables are written"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.only or BENCHMARKS:
        found = []
        for row in BENCHMARKS[name]():
            print(row.json(), flush=True)
            found.append(row)
        write_table(arguments.page, name, found, arguments.threads)


if __name__ == "__main__":
    main()
