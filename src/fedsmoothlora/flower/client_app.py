"""The ClientApp, which runs at a site, in a new process for every message."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.errors import BehindError, DivergedError, LostStateError, SpentBudgetError
from fedsmoothlora.federation.messages import Message as RoundMessage
from fedsmoothlora.federation.wire import pack, unpack
from fedsmoothlora.flower.records import from_records, to_records
from fedsmoothlora.flower.site import Preparation, Site

_log = logging.getLogger("flwr")  # its messages are in the site's own log


class _Notes(Callback):
    """Writes notes to the site's own log, and sends them nowhere."""

    def on_note(self, text: str) -> None:
        _log.warning(text)


def client_app(config: Path, preparation: Preparation | None = None) -> ClientApp:
    """The ClientApp of a federation.

    Args:
        config: its ``config.toml``.
        preparation: reads the data and loads the model for a message; from disk unless given.
    """
    app = ClientApp()

    def site(context: Context) -> Site:
        return Site.at(read(config), context.node_config, preparation or Preparation())

    @app.query("agree")
    def agree(message: Message, context: Context) -> Message:
        return _answered(
            message,
            lambda: to_records(site_info=site(context).info().table(), status={"status": "done"}),
        )

    @app.train()
    def train(message: Message, context: Context) -> Message:
        def train() -> RecordDict:
            reply = site(context).train(_content(message), _Notes())
            return to_records(pack(reply), status={"status": "done"})

        return _answered(message, train)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        def evaluate() -> RecordDict:
            metrics = site(context).validate(_content(message), _Notes())
            return to_records(metrics=metrics, status={"status": "done"})

        return _answered(message, evaluate)

    return app


def _content(message: Message) -> RoundMessage:
    return unpack(RoundMessage, from_records(message.content))


def _answered(message: Message, answer: Callable[[], RecordDict]) -> Message:
    """The reply, also if an error occurs. Its text may quote data, so only its category is sent."""
    try:
        content = answer()
    except DivergedError as error:
        content = _refusal("diverged", error)
    except LostStateError as error:
        content = _refusal("lost", error)
    except SpentBudgetError as error:
        content = _refusal("spent", error)
    except BehindError as error:
        content = _refusal("behind", error)
    except Exception as error:
        _log.error("%s", error, exc_info=error)
        content = to_records(status={"status": "failed"})
    return Message(content, reply_to=message)


def _refusal(status: str, error: Exception) -> RecordDict:
    _log.warning("%s: %s", status, error)
    return to_records(status={"status": status})
