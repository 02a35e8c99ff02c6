"""A run's server as its folder has it: what a resumed run goes on from, and what an export is made of."""

from __future__ import annotations

from collections.abc import Callable

from fedsmoothlora.errors import StateError
from fedsmoothlora.federation.server import Server
from fedsmoothlora.storage.checkpoints import Checkpoint, Checkpoints, restore
from fedsmoothlora.storage.run_folder import RunFolder


def restore_server(
    server: Server,
    folder: RunFolder,
    checkpoints: Checkpoints,
    note: Callable[[str], None],
    round: int | None = None,
) -> Checkpoint | None:
    """Put the newest checkpoint that is whole into a server built from the folder's own configuration.

    Nothing is written; ``server.updates`` are the folder's, read when they are asked for.

    Args:
        server: before its first round.
        folder: the run's.
        checkpoints: in that folder.
        note: told of checkpoints that are passed over.
        round: take the checkpoint after this many finished rounds, and no other.

    Returns:
        The checkpoint; None where the run has not written any.

    Raises:
        StateError: no checkpoint can be used, or that of ``round`` is not kept.
    """
    paths = list(checkpoints.newest_first())
    if round is not None:
        there = [int(path.stem) for path in paths]
        if round not in there:
            raise StateError(
                f"{folder.checkpoints} has no checkpoint after round {round}; there are those after "
                f"{', '.join(map(str, sorted(there))) or 'none'} (checkpoint.keep says how many are kept)"
            )
        paths = [path for path in paths if int(path.stem) == round]
    problems: list[str] = []
    for path in paths:
        try:
            checkpoint, tensors, updates = checkpoints.load(path, folder.updates)
        except StateError as error:
            problems.append(str(error))
            if path != paths[-1]:
                note(f"{error}; the checkpoint before it is used")
            continue
        restore(server, checkpoint, tensors, updates)
        return checkpoint
    if problems:
        raise StateError(f"no checkpoint in {folder.checkpoints} can be used: {'; '.join(problems)}")
    return None
