"""Restore a run's server from its folder, to resume the run or to export its model."""

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
    """Restore the newest intact checkpoint in a server that was built from the folder's own configuration.

    Nothing is written. ``server.updates`` become files of the folder, which are read at every access.

    Args:
        server: the server before its first round.
        folder: the run's folder.
        checkpoints: the checkpoints in that folder.
        note: called with a sentence for every checkpoint that is skipped.
        round: use the checkpoint after this many finished rounds; the newest intact one unless given.

    Returns:
        The checkpoint; None if the run has not written any.

    Raises:
        StateError: no checkpoint can be used, or there is none after ``round`` rounds.
    """
    paths = list(checkpoints.newest_first())
    if round is not None:
        there = [int(path.stem) for path in paths]
        if round not in there:
            raise StateError(
                f"{folder.checkpoints} has no checkpoint after round {round}; it has checkpoints after "
                f"{', '.join(map(str, sorted(there))) or 'none'} (checkpoint.keep sets how many are kept)"
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
