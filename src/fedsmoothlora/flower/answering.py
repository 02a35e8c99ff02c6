"""A site's answer to a question of the coordinator, also if an error occurs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.errors import BehindError, DivergedError, LostStateError, SpentBudgetError, WireError
from fedsmoothlora.federation.devices import computing
from fedsmoothlora.federation.messages import Message
from fedsmoothlora.federation.payload import Payload
from fedsmoothlora.federation.wire import pack, unpack
from fedsmoothlora.flower.questions import Answer, Question, Status
from fedsmoothlora.flower.site import Site
from fedsmoothlora.secure_aggregation.messages import Delivery
from fedsmoothlora.secure_aggregation.serialization import loaded

_log = logging.getLogger("flwr")  # its messages are in the site's own log


class _Notes(Callback):
    """Writes notes to the site's own log, and sends them nowhere."""

    def on_note(self, text: str) -> None:
        _log.warning(text)


def answer(site: Callable[[], Site], question: Question) -> Answer:
    """Answer a question.

    The text of an error may quote data, so only its category is in the answer. The text is in the site's own
    log.

    Args:
        site: makes the site; may raise an error too.
        question: the coordinator's question.
    """
    try:
        asked = site()
        with computing(asked.config.machine):
            return _done(asked, question)
    except DivergedError as error:
        return _refusal("diverged", error)
    except LostStateError as error:
        return _refusal("lost", error)
    except SpentBudgetError as error:
        return _refusal("spent", error)
    except BehindError as error:
        return _refusal("behind", error)
    except Exception as error:
        _log.error("%s", error, exc_info=error)
        return Answer(status="failed")


def _done(site: Site, question: Question) -> Answer:
    if question.kind == "agree":
        return Answer(status="done", tables={"site_info": site.info().table()})
    if question.payload is None:
        raise WireError("it has no tensors")
    if question.kind == "mask":
        return Answer(status="done", payload=_masked(site, question.payload))
    message = unpack(Message, question.payload)
    if question.kind == "train":
        return Answer(status="done", payload=pack(site.train(message, _Notes())))
    found = site.validate(message, _Notes())
    weight = {} if found.weight is None else {"evaluation": {"weight": found.weight}}
    return Answer(status="done", tables={"metrics": found.metrics, **weight})


def _masked(site: Site, payload: Payload) -> Payload:
    """The masked upload of a client's round. The question holds other sites' shares beside the message."""
    fields = dict(payload.fields)
    deliveries = loaded(dict[str, Delivery], str(fields.pop("deliveries", "")).encode())
    message = unpack(Message, replace(payload, fields=fields))
    return site.train_masked(message, deliveries, _Notes())


def _refusal(status: Status, error: Exception) -> Answer:
    _log.warning("%s: %s", status, error)
    return Answer(status=status)
