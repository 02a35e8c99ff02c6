"""The defaults of every task learn: nothing is set but sources, templates, and limits of the time."""

from pathlib import Path

import pytest

from benchmarks.defaults import CASES, SEEDS, WITHOUT_REFERENCE, learned
from fedsmoothlora import tasks


def test_every_task_has_a_case_unless_there_is_no_reference() -> None:
    assert sorted([*CASES, *WITHOUT_REFERENCE]) == sorted(tasks.names())


@pytest.mark.parametrize("task", CASES)
def test_a_case_sets_nothing_that_training_depends_on(task: str) -> None:
    case = CASES[task]
    assert case.sections.keys() <= {"model", "data", "task"}
    for section in ("model", "data"):
        assert case.sections[section].keys() == {"source"}
    set_here = {key for key in case.limits if key.startswith(("training.", "lora.", "method."))}
    assert set_here <= {"training.rounds", "method.name", "method.calibration_batches"}


@pytest.mark.release
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("task", CASES)
def test_defaults_close_at_least_half_of_the_gap(task: str, seed: int, tmp_path: Path) -> None:
    found = learned(CASES[task], seed, tmp_path)
    assert found.reference > found.majority + 0.2
    assert found.share >= 0.5, found
