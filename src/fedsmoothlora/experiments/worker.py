"""A process that runs runs: one JSON line a run on standard input, what happens as JSON lines on output."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from fedsmoothlora.errors import InterruptedRunError
from fedsmoothlora.experiments.display import PlannedRunCallback
from fedsmoothlora.experiments.planned_runs import carry_out, planned_run_from_task
from fedsmoothlora.federation.records import RoundRecord


class SendingCallback(PlannedRunCallback):
    """Sends notes and the global model's metrics to the process that waits for them."""

    def on_note(self, text: str) -> None:
        send({"note": text})

    def on_round_end(self, record: RoundRecord) -> None:
        metrics = {figure.name: figure.value for figure in record.metrics if figure.client is None}
        send({"round": record.round, "metrics": metrics})


def send(event: dict[str, Any]) -> None:
    """One line; a process that nobody listens to any more ends."""
    try:
        _out.write(json.dumps(event) + "\n")
        _out.flush()
    except BrokenPipeError:
        os._exit(1)


def main() -> None:
    """Run runs until there are no more."""
    for line in sys.stdin:
        try:
            state: str = carry_out(planned_run_from_task(json.loads(line)), SendingCallback())
        except InterruptedRunError:
            send({"state": "interrupted"})
            return
        send({"state": state})


# What libraries print must not come between the lines.
_out = sys.stdout

if __name__ == "__main__":
    sys.stdout = sys.stderr
    main()
