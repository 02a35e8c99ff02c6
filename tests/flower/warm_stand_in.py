"""A warm process without a model, as a module of its own: its answers are what the questions ask for."""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedsmoothlora.flower.questions import Answer, Question
from fedsmoothlora.flower.warm import WarmStart, warm_answer


def answers(config: Path, node: Mapping[str, Any]) -> Callable[[Question], Answer]:
    def answer(question: Question) -> Answer:
        fields = question.payload.fields if question.payload else {}
        if fields.get("do") == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fields.get("do") == "fail":
            return Answer(status="failed")
        if fields.get("do") == "train for long":
            Path(str(fields["mark"])).write_text(str(os.getpid()))
            time.sleep(600)
        return Answer(
            status="done",
            tables={"process": {"pid": os.getpid(), "client": node["client-id"]}},
            payload=question.payload,
        )

    return answer


def supernode(config: str, state: str, *fields: str) -> None:
    """A process that starts a ClientApp's process, as Flower's does, and stays."""
    import subprocess

    with subprocess.Popen([sys.executable, __file__, "app", config, state, *fields]) as app:
        app.wait()
        time.sleep(600)


def app(config: str, state: str, *fields: str) -> None:
    """A ClientApp's process that asks one question."""
    from fedsmoothlora.federation.payload import Payload

    node = {"client-id": "a", "state": state}
    payload = Payload(b"", dict(zip(fields[::2], fields[1::2], strict=True)))
    start = WarmStart(config=Path(config), node=node, run=1, program="warm_stand_in")
    found = warm_answer(start, Question(kind="train", payload=payload))
    assert found is not None
    Path(config).with_name("answered").write_text(str(found.tables["process"]["pid"]))


if __name__ == "__main__":
    if sys.argv[1] in ("supernode", "app"):
        {"supernode": supernode, "app": app}[sys.argv[1]](*sys.argv[2:])
    else:
        from fedsmoothlora.flower.warm_process import main

        main(answers)
