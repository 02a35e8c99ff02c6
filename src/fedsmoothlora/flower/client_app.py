"""The ClientApp, which runs at a site, in a new process for every message.

Reading this module imports no torch: with a warm process, the ClientApp's process never needs it.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsmoothlora.errors import SiteError
from fedsmoothlora.flower.questions import WITHOUT_MODEL, Answer, Kind, Question
from fedsmoothlora.flower.records import from_records, to_records

if TYPE_CHECKING:
    from fedsmoothlora.flower.site import Preparation
    from fedsmoothlora.flower.warm import WarmStart

_log = logging.getLogger("flwr")  # its messages are in the site's own log


def client_app(config: Path, preparation: Preparation | None = None) -> ClientApp:
    """The ClientApp of a federation.

    Args:
        config: its ``config.toml``.
        preparation: reads the data and loads the model for a message, in this process. Unless given, the warm
            process answers, or with ``flower.warm = false`` this process, from disk.
    """
    app = ClientApp()

    def answered(kind: Kind, message: Message, context: Context) -> Message:
        try:
            payload = None if kind == "agree" else from_records(message.content)
            found = _answer(config, context, preparation, Question(kind=kind, payload=payload))
        except Exception as error:  # its text may quote data, and stays here
            _log.error("%s", error, exc_info=error)
            found = Answer(status="failed")
        return Message(
            to_records(found.payload, **found.tables, status={"status": found.status}), reply_to=message
        )

    @app.query("agree")
    def agree(message: Message, context: Context) -> Message:
        return answered("agree", message, context)

    @app.query("end")
    def end(message: Message, context: Context) -> Message:
        if preparation is None and sys.platform == "linux":
            from fedsmoothlora.flower.warm import end_warm_process

            end_warm_process(_start(config, context))
        return Message(to_records(status={"status": "done"}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answered("train", message, context)

    @app.train("masked")
    def mask(message: Message, context: Context) -> Message:
        return answered("mask", message, context)

    for stage in WITHOUT_MODEL:
        app.query(stage)(partial(answered, stage))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answered("evaluate", message, context)

    return app


def _answer(config: Path, context: Context, preparation: Preparation | None, question: Question) -> Answer:
    """The answer of the warm process, or of this one if there is none, or if no model is needed."""
    if question.kind in WITHOUT_MODEL:
        from fedsmoothlora.flower.secure_site import SecureSite

        return Answer(status="done", payload=SecureSite.at(context.node_config).answer(question))
    if preparation is None and sys.platform == "linux":
        from fedsmoothlora.flower.warm import warm_answer

        try:
            if (found := warm_answer(_start(config, context), question)) is not None:
                return found
        except SiteError as error:
            _log.warning("this process answers without a warm process: %s", error)
    # Here, because it imports torch.
    from fedsmoothlora.config import read
    from fedsmoothlora.flower.answering import answer
    from fedsmoothlora.flower.site import Site

    return answer(lambda: Site.at(read(config), context.node_config, preparation), question)


def _start(config: Path, context: Context) -> WarmStart:
    from fedsmoothlora.flower.warm import WarmStart

    return WarmStart(config=config, node=context.node_config, run=context.run_id)
