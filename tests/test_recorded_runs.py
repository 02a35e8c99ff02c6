"""Run folders written before the package was restructured are resumed, reported and exported by today's code.

``tests/recorded`` holds runs of commit 61b37c8, each once stopped after two of four rounds and once finished:

- ``stopped``, ``whole``: FedSmoothLoRA with two of three clients a round;
- ``kept-stopped``, ``kept-whole``: FedIT with a server optimiser and a head that is trained whole;
- ``own-stopped``, ``own-whole``: a `Federation`.

Another machine may round differently, so metrics of rounds that are computed again are compared within a
tolerance.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedsmoothlora import Federation, export, load_adapter, run

RECORDED = Path(__file__).parent / "recorded"
# Rounds finished when the stopped runs were stopped.
STOPPED_AFTER = 2


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the recorded folders, as the current directory: their configurations name relative paths."""
    folder = tmp_path / "recorded"
    shutil.copytree(RECORDED, folder)
    monkeypatch.chdir(folder)
    return folder


def metrics(folder: Path) -> dict[tuple[int, str | None, str], float]:
    """Metrics by round, client and name; seconds are left out."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        (line["round"], line["client"], line["name"]): line["value"]
        for line in lines
        if not line["name"].startswith("seconds")
    }


def assert_same(resumed: Path, finished: Path) -> None:
    """Every metric of the finished run is in the resumed one: recorded rounds exactly, later ones nearly."""
    found, expected = metrics(resumed), metrics(finished)
    assert expected.keys() <= found.keys()
    for key, value in expected.items():
        tolerance = 0.0 if key[0] <= STOPPED_AFTER else 2e-2
        assert found[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key


class Net(nn.Module):
    """The model of the recorded `Federation`."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 16)
        self.classifier = nn.Linear(16, 4)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.hidden(x)))


def points(rows: int, seed: int) -> TensorDataset:
    """Four corners of a plane among eight noisy numbers."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(4, (rows,), generator=generator)
    x = torch.randn(rows, 8, generator=generator)
    x[:, 0] += 4 * (corners % 2)
    x[:, 1] += 4 * (corners // 2)
    return TensorDataset(x, corners)


def federation() -> Federation:
    """The recorded `Federation`."""
    return Federation(
        Net(),
        {"north": points(60, 1), "south": points(40, 2)},
        test=points(80, 3),
        head=["classifier"],
        lora={"r": 2, "target_modules": ["hidden"]},
        options={"gamma": 16, "calibration_batches": 2},
        training={"rounds": 4, "batch_size": 8, "lr": 0.05},
        machine={"threads": 1, "device": "cpu"},
    )


@pytest.mark.parametrize(("stopped", "finished"), [("stopped", "whole"), ("kept-stopped", "kept-whole")])
def test_a_stopped_run_is_resumed(recorded: Path, stopped: str, finished: str) -> None:
    run(resume=recorded / stopped)

    assert_same(recorded / stopped, recorded / finished)
    assert (recorded / stopped / "model" / "model.safetensors").is_file()


def test_a_stopped_federation_is_resumed_by_its_recorded_weights(recorded: Path) -> None:
    federation().run(out=recorded / "own-stopped", resume=True)

    assert_same(recorded / "own-stopped", recorded / "own-whole")


@pytest.mark.report
@pytest.mark.parametrize("name", ["stopped", "whole", "kept-whole", "own-whole"])
def test_a_run_is_reported(recorded: Path, name: str) -> None:
    from fedsmoothlora.reports.report import write_report

    page = write_report(recorded / name).read_text(encoding="utf-8")

    assert "accuracy" in page
    assert "north" in page


def test_a_run_is_exported_as_it_was(recorded: Path) -> None:
    export(recorded / "whole", as_="adapter", out=recorded / "again")

    inputs = {"input_ids": torch.arange(20).reshape(2, 10), "attention_mask": torch.ones(2, 10)}
    before, after = (load_adapter(recorded / name)(**inputs).logits for name in ("adapter", "again"))
    assert before.shape == (2, 3)
    assert torch.allclose(before, after, atol=1e-6)


def test_the_hash_of_the_base_in_an_exported_adapter_is_recognised(recorded: Path) -> None:
    assert load_adapter(recorded / "adapter") is not None
