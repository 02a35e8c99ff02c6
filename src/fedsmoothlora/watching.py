"""What a run tells whoever watches it: progress bars, plain lines, or nobody."""


class Watcher:
    """Told of a run's steps as they happen. This one says nothing; the edges show more."""

    def round_begins(self, round: int, rounds: int, clients: int) -> None:
        """Round ``round`` (counted from 0) of ``rounds`` begins with that many clients."""

    def client_begins(self, client: str, steps: int) -> None:
        """A client begins its calibration and ``steps`` steps of local training."""

    def client_step(self, client: str, loss: float) -> None:
        """One step of local training."""

    def client_ends(self, client: str) -> None:
        """The client's visit is over, well or badly."""

    def note(self, text: str) -> None:
        """Something a person should know."""
