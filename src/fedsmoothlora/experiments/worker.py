"""The worker process: reads planned runs from standard input, writes events to standard output, as JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from fedsmoothlora.errors import InterruptedRunError
from fedsmoothlora.experiments.display import PlannedRunCallback
from fedsmoothlora.experiments.planned_runs import carry_out, from_message
from fedsmoothlora.federation.records import RoundRecord


class SendingCallback(PlannedRunCallback):
    """Sends notes and the global model's metrics to the parent process."""

    def on_note(self, text: str) -> None:
        send({"note": text})

    def on_round_end(self, record: RoundRecord) -> None:
        metrics = {metric.name: metric.value for metric in record.metrics if metric.client is None}
        send({"round": record.round, "metrics": metrics})


def send(event: dict[str, Any]) -> None:
    """Write one event as a line. End this process if the parent process is gone."""
    try:
        _out.write(json.dumps(event) + "\n")
        _out.flush()
    except BrokenPipeError:
        os._exit(1)


def main() -> None:
    """Carry out planned runs until standard input ends."""
    for line in sys.stdin:
        try:
            state: str = carry_out(from_message(line), SendingCallback())
        except InterruptedRunError:
            send({"state": "interrupted"})
            return
        send({"state": state})


# Standard output carries events only; whatever libraries print goes to standard error.
_out = sys.stdout

if __name__ == "__main__":
    sys.stdout = sys.stderr
    main()
