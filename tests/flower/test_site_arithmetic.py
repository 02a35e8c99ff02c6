"""A site answers with `machine.deterministic` and `machine.tf32` of its own configuration."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsmoothlora.federation import devices
from fedsmoothlora.federation.settings import MachineSettings
from fedsmoothlora.flower.answering import answer
from fedsmoothlora.flower.questions import Question


def test_a_site_computes_so_while_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "resolved", lambda name: torch.device("cuda"))
    found: list[bool] = []

    def info() -> Any:
        found.append(torch.are_deterministic_algorithms_enabled())
        return SimpleNamespace(table=dict)

    machine = MachineSettings(deterministic=True)
    site: Any = SimpleNamespace(config=SimpleNamespace(machine=machine), info=info)
    assert answer(lambda: site, Question(kind="agree")).status == "done"
    assert found == [True]
    assert not torch.are_deterministic_algorithms_enabled()
