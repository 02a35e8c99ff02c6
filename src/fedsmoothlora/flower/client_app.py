"""The ClientApp: what runs at a site, in a process of its own for every message."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.errors import BehindError, DivergedError, LostStateError
from fedsmoothlora.federation.messages import Message as RoundMessage
from fedsmoothlora.federation.wire import pack, unpack
from fedsmoothlora.flower.records import from_records, to_records
from fedsmoothlora.flower.site import Site

_log = logging.getLogger("flwr")  # what the site's operator reads


class _Notes(Callback):
    """Notes go into the site's own log and nowhere else."""

    def on_note(self, text: str) -> None:
        _log.warning(text)


def client_app(config: Path) -> ClientApp:
    """The ClientApp of a federation.

    Args:
        config: its ``config.toml``.
    """
    app = ClientApp()

    @app.query("agree")
    def agree(message: Message, context: Context) -> Message:
        return _answered(
            message,
            lambda: to_records(site_info=_site(config, context).info().table(), status={"status": "done"}),
        )

    @app.train()
    def train(message: Message, context: Context) -> Message:
        def train() -> RecordDict:
            reply = _site(config, context).train(_content(message), _Notes())
            return to_records(pack(reply), status={"status": "done"})

        return _answered(message, train)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        def evaluate() -> RecordDict:
            metrics = _site(config, context).validate(_content(message), _Notes())
            return to_records(metrics=metrics, status={"status": "done"})

        return _answered(message, evaluate)

    return app


def _site(config: Path, context: Context) -> Site:
    return Site.at(read(config), context.node_config)


def _content(message: Message) -> RoundMessage:
    return unpack(RoundMessage, from_records(message.content))


def _answered(message: Message, answer: Callable[[], RecordDict]) -> Message:
    """A reply in any case. Errors may quote data: their text stays at the site, only their kind is sent."""
    try:
        content = answer()
    except DivergedError as error:
        content = _refusal("diverged", error)
    except LostStateError as error:
        content = _refusal("lost", error)
    except BehindError as error:
        content = _refusal("behind", error)
    except Exception as error:
        _log.error("%s", error, exc_info=error)
        content = to_records(status={"status": "failed"})
    return Message(content, reply_to=message)


def _refusal(status: str, error: Exception) -> RecordDict:
    _log.warning("%s: %s", status, error)
    return to_records(status={"status": status})
