"""The device that `machine.device` names."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.training import devices
from fedsmoothlora.training.devices import accelerator_for, described, resolved

Table = dict[str, Any]


class FakeMachine:
    """torch's answers on a machine with GPUs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int = 1) -> None:
        self.current = 0
        device = None if kind is None else torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: device)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")


@pytest.mark.parametrize(
    ("kind", "name", "wanted", "words"),
    [
        (None, "auto", "cpu", "cpu"),
        (None, "cpu", "cpu", "cpu"),
        ("cuda", "auto", "cuda", "cuda:0 (GPU 0)"),
        ("cuda", "cpu", "cpu", "cpu"),
        ("cuda", "cuda", "cuda", "cuda:0 (GPU 0)"),
        ("cuda", "cuda:1", "cuda:1", "cuda:1 (GPU 1)"),
        ("mps", "auto", "cpu", "cpu"),
        ("xpu", "auto", "cpu", "cpu"),
    ],
)
def test_the_device_of_a_machine(
    monkeypatch: pytest.MonkeyPatch, kind: str | None, name: str, wanted: str, words: str
) -> None:
    FakeMachine(monkeypatch, kind, count=2)
    assert resolved(name) == torch.device(wanted)
    assert described(name) == words


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (None, "cuda", "finds no accelerator on this machine"),
        ("mps", "cuda:0", "finds the accelerator 'mps'"),
        ("mps", "mps", "summed in float64, which Apple's GPUs lack; take 'cpu'"),
        ("cuda", "gpu", "should be 'auto', 'cpu', 'cuda', or 'cuda:N'"),
        ("cuda", "cuda:2", "this machine has 2 GPUs, numbered 0 to 1"),
    ],
)
def test_a_device_that_the_machine_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: str | None, name: str, words: str
) -> None:
    FakeMachine(monkeypatch, kind, count=2)
    with pytest.raises(ConfigError, match=f"machine.device = {name!r}: .*{words}"):
        resolved(name)


def test_an_accelerator_is_refused_after_training_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator_for("cpu")
    FakeMachine(monkeypatch, "cuda")
    with pytest.raises(ConfigError, match=r"this process has trained on 'cpu' before.*start a new process"):
        accelerator_for("cuda")


def test_variables_of_accelerate_do_not_change_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    weight = torch.ones((), requires_grad=True)
    accelerator_for("cpu").backward(3 * weight)
    assert weight.grad == 3


class Scaling(Accelerator):
    """Accelerate on a GPU with ``ACCELERATE_MIXED_PRECISION=fp16``."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.scaler = object()


def test_a_loss_that_accelerate_would_scale_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "Accelerator", Scaling)
    with pytest.raises(ConfigError, match="mixed precision 'fp16'"):
        accelerator_for("cpu")


@pytest.mark.parametrize("name", ["gpu", "xpu", "cuda:", "cuda:x", "cuda:01", "cuda:256", "CPU", ""])
def test_a_name_of_no_device_is_refused_with_the_configuration(toy_table: Table, name: str) -> None:
    with pytest.raises(ConfigError, match=f"machine.device = {name!r}: should be 'auto', 'cpu', 'cuda'"):
        read(toy_table, {"machine.device": name})


def test_a_gpu_without_float64_is_refused_with_the_configuration(toy_table: Table) -> None:
    with pytest.raises(ConfigError, match=r"machine\.device = 'mps': norms and losses are summed in float64"):
        read(toy_table, {"machine.device": "mps"})
