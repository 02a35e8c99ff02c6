"""A client with a personal model, in the rounds and after them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fedsmoothlora.algebra.coding import decoded
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.schedules import learning_rate_at
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.data.examples import Examples
from fedsmoothlora.errors import DivergedError
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.devices import placed
from fedsmoothlora.federation.messages import Message
from fedsmoothlora.federation.personal import Deviation, GlobalModel, PersonalTraining
from fedsmoothlora.federation.settings import PersonalSettings
from fedsmoothlora.federation.visit import Visit


@dataclass(frozen=True, kw_only=True)
class PersonalClient:
    """A client with a model of its own beside the global one.

    Attributes:
        client: the client's id.
        data: the client's training rows.
        settings: ``[personal]``.
        steps: the number of steps of local training in a round.
        trains: trains a personal model, at the client's rank.
    """

    client: str
    data: Examples
    settings: PersonalSettings
    steps: int
    trains: PersonalTraining

    def after(self, visit: Visit, message: Message, state: ClientState, callback: Callback) -> Visit:
        """Train the personal model after `visit`; the model is then the personal one (Ditto).

        It continues from the deviation that the client kept with its last accepted upload. If it diverges,
        the deviation stays as it was.

        Args:
            visit: the result of the client's round.
            message: the server's message.
            state: the client's state before the visit.
            callback: notified if the personal model diverges.

        Returns:
            The visit, with the personal model in its state.
        """
        assert visit.at is not None
        assert self.settings.ditto is not None
        training, before = self.trains.training, self.deviation(message, state)
        try:
            after = self.trains.train(
                visit.at,
                before,
                self.data,
                purpose=("personal", message.round, message.attempt, self.client),
                steps=self.settings.steps or self.steps,
                lr=learning_rate_at(message.round, training.rounds, training.lr, training.lr_min),
                weight=self.settings.ditto,
            )
        except DivergedError as error:
            callback.on_note(
                f"client {self.client}: its personal model diverged in round {message.round + 1} and stays "
                f"as it was: {error}; try a smaller personal.ditto than {self.settings.ditto:g}"
            )
            after = before
            self.trains.load(visit.at, before)
        kept = {**visit.state.uploads[message.round], **after.kept()}
        return replace(visit, state=visit.state.with_upload(message.round, kept))

    def load(self, message: Message, state: ClientState) -> None:
        """Make the model the client's personal one. ``message.lora`` is the whole LoRA of the server."""
        self.trains.load(self._global_model(message), self.deviation(message, state))

    def fine_tune(self, message: Message, steps: int) -> None:
        """Make the model a copy of the global one that is trained for ``steps`` steps on the client's rows.

        Raises ``DivergedError`` if the loss or weights are not finite.
        """
        self.trains.train(
            self._global_model(message),
            Deviation(),
            self.data,
            purpose=("fine-tuning", message.round, self.client),
            steps=steps,
            lr=self.trains.training.lr,
            weight=0.0,
        )

    def deviation(self, message: Message, state: ClientState) -> Deviation:
        """The deviation that the client kept with its last accepted upload; 0 if there is none."""
        return Deviation.kept_in(state.uploads.get(message.accepted_round, {})).to(self._device)

    @property
    def _device(self) -> torch.device:
        return self.trains.accelerator.device

    def _global_model(self, message: Message) -> GlobalModel:
        """The global model of a message with the server's whole LoRA."""
        whole = {name: LowRank.of(product) for name, product in decoded(message.lora).items()}
        return GlobalModel(lora=placed(whole, self._device), head=placed(message.head, self._device))
