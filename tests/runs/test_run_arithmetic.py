"""A run computes with `machine.deterministic` and `machine.tf32`, and records its device."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.federation import devices
from fedsmoothlora.federation.records import RoundRecord
from fedsmoothlora.runs.environment import environment
from fedsmoothlora.runs.session import run


class Switches(Callback):
    """Whether algorithms are deterministic, and products in TF32, after each round."""

    def __init__(self) -> None:
        self.found: list[tuple[bool, bool]] = []

    def on_round_end(self, record: RoundRecord) -> None:
        self.found.append(
            (torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.allow_tf32)
        )


def test_all_rounds_of_a_run_on_a_gpu_compute_so(
    toy_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The clients stay on the CPU, whose operations torch checks too.
    monkeypatch.setattr(devices, "resolved", lambda name: torch.device("cuda"))
    toy_table["machine"] = {"threads": 1, "deterministic": True, "tf32": True}
    heard = Switches()
    run(toy_table, {"training.rounds": 1}, out=tmp_path / "out", callbacks=[heard], outputs=False)
    assert heard.found == [(True, True)] * 2
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(("name", "words"), [("cpu", "cpu"), ("cuda:1", "cuda:1 (GPU 1)")])
def test_the_device_that_clients_train_on_is_recorded(
    monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert environment(name)["device"] == words
