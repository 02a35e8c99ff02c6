"""The view that a method has of a client: its state, and its calibration gradients on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from accelerate import Accelerator
from torch import Tensor

from fedsmoothlora.algebra.sketches import Sketch
from fedsmoothlora.data.examples import Batch
from fedsmoothlora.federation.client_changes import ClientChanges
from fedsmoothlora.federation.client_loss import ClientLoss
from fedsmoothlora.federation.client_round import ClientRound
from fedsmoothlora.federation.devices import placed
from fedsmoothlora.federation.initial_state import InitialState
from fedsmoothlora.federation.personal import without_personal
from fedsmoothlora.federation.sample_privacy import no_gradients
from fedsmoothlora.federation.transport import Transport
from fedsmoothlora.methods import ClientView, Method, Products, Update
from fedsmoothlora.modeling.adapters import AdaptedModel
from fedsmoothlora.training.calibration import calibration_gradients, calibration_sketches
from fedsmoothlora.training.loop import checkpointing
from fedsmoothlora.training.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class ClientViews:
    """Makes the views of clients that use one model in turn.

    Attributes:
        model: the adapted model.
        method: the federated method.
        loss: the loss whose gradients are calibrated.
        training: ``[training]``.
        accelerator: the device of all tensors of a view.
        initial_state: the state that server and clients share before round 0.
        transport: the number format of sent factors.
        changes: the changes that are sent with packed transport.
        ranks: LoRA ranks by client, if they differ.
        calibrates: whether calibration may read the rows; with sample-level privacy it may not.
    """

    model: AdaptedModel
    method: Method
    loss: ClientLoss
    training: TrainingSettings
    accelerator: Accelerator
    initial_state: InitialState
    transport: Transport
    changes: ClientChanges
    ranks: Mapping[str, int]
    calibrates: bool

    def of(self, at: ClientRound) -> tuple[ClientView, dict[str, Tensor]]:
        """The view of a client, and the LoRA and the head that it shares with the server.

        Raises ``LostStateError`` if the message brings changes of a LoRA or head that the client has lost.
        """
        device, message, layers = self.accelerator.device, at.message, self.model.layers
        if self.ranks:
            self.model.use_rank(self.ranks[at.client])
            layers = self.model.layers_at(self.ranks[at.client])
        kept, received = _matched(at)
        gradients, sketch = self._calibration(at) if self.calibrates else (no_gradients, no_gradients)
        view = ClientView(
            round=message.round,
            rounds=self.training.rounds,
            layers=layers,
            device=device,
            server_lora={},
            kept=placed(kept, device),
            kept_round=message.accepted_round if kept else -1,
            received=placed(received, device),
            gradients=gradients,
            sketch=sketch,
            initial=lambda name: self.initial_state.initial(name, layers[name].rank).to(device=device),
            orthonormal=lambda name: self.initial_state.orthonormal(name).to(device=device),
            generator=at.generator,
            pretrained=self.initial_state.pretrained,
            prepared=placed(self.initial_state.prepared, device),
            exchanged=placed(message.gradients, device),
            code=self.transport.code,
            packs=self.transport.packs,
            nbytes=self.transport.product_bytes,
        )
        if self.method.two_exchanges:
            view = replace(view, basis=placed(self._basis(view, at), device))
        held = self.changes.held(view, message)
        lora = self.transport.decoded(placed(self.changes.lora(view, message, held), device))
        return replace(view, server_lora=lora), held

    def _calibration(
        self, at: ClientRound
    ) -> tuple[
        Callable[[Products], Mapping[str, Tensor]],
        Callable[[Products, Mapping[str, Sketch]], Mapping[str, Tensor]],
    ]:
        """``ClientView.gradients`` and ``ClientView.sketch``; both read the same batches (step 2)."""
        model, loss, settings = self.model, self.loss, self.method.calibration
        seed = at.seed("calibration draws")

        def batches() -> Iterator[Batch]:
            size = settings.batch_size or self.training.batch_size
            return at.batches(settings.batches, "calibration", size)

        @contextmanager
        def calibrating(products: Products) -> Iterator[None]:
            """The weights are ``W^t + s * products``, without LoRA."""
            model.backbone.set_shift(products)
            with model.without_lora(), checkpointing(model.model, self.training):
                yield

        def gradients(products: Products) -> Mapping[str, Tensor]:
            with calibrating(products):
                return calibration_gradients(
                    model.model, model.modules, batches(), loss, loss.split, seed=seed
                )

        def sketch(products: Products, sketches: Mapping[str, Sketch]) -> Mapping[str, Tensor]:
            with calibrating(products):
                return calibration_sketches(
                    model.model, model.modules, sketches, batches, loss, loss.split, seed=seed
                )

        return gradients, sketch

    def _basis(self, view: ClientView, at: ClientRound) -> dict[str, Tensor]:
        """``Q_t`` by layer: from the message, from the last update, or the seeded one of round 0.

        A client whose state is lost takes the seeded one too. The others' subspace is another one then, which
        loses nothing: ``Q_t`` decides only in which directions the next ``P`` points.
        """
        last, basis = at.state.last_update(at.message.round), dict(at.message.basis)
        for name in view.layers:
            if name not in basis:
                basis[name] = (
                    self.method.computed_basis(name, last[name])
                    if name in last
                    else self.initial_state.orthonormal(name).A.mT.contiguous()
                )
        return basis


def _matched(at: ClientRound) -> tuple[Update, Products]:
    """The client's state with its last accepted upload, and the server's updates since; empty if lost."""
    message, uploads = at.message, at.state.uploads
    kept = without_personal(uploads.get(message.accepted_round, {}))
    received = at.state.received_since(message.accepted_round, message.round) if kept else {}
    if message.accepted_round >= 0 and (received is None or message.accepted_round not in uploads):
        at.note(
            f"its state from round {message.accepted_round + 1} is lost; it takes part like a new client, "
            "without round matching"
        )
        return {}, {}
    return kept, received or {}
