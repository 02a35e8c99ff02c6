"""Deterministic algorithms and TF32 on a GPU. torch has its switches without a GPU too."""

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.federation.devices import device_notes
from fedsmoothlora.federation.settings import MachineSettings
from fedsmoothlora.training.arithmetic import arithmetic, prepare

CPU, GPU = torch.device("cpu"), torch.device("cuda")
VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
Table = dict[str, Any]


def switches() -> tuple[bool, ...]:
    """Whether algorithms are deterministic, torch's and cuDNN's; cuDNN measures; TF32 in products, cuDNN."""
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        torch.backends.cuda.matmul.allow_tf32,
        cudnn.allow_tf32,
    )


@pytest.fixture
def benchmarking() -> Iterator[None]:
    """A process in which cuDNN measures its algorithms, so that switching this off can be seen."""
    torch.backends.cudnn.benchmark = True
    yield
    torch.backends.cudnn.benchmark = False


@pytest.mark.usefixtures("benchmarking")
@pytest.mark.parametrize(
    ("deterministic", "tf32", "wanted"),
    [
        (False, None, (False, False, True, False, True)),
        (False, True, (False, False, True, True, True)),
        (False, False, (False, False, True, False, False)),
        (True, None, (True, True, False, False, True)),
        (True, True, (True, True, False, True, True)),
    ],
)
def test_torch_is_set_in_the_context_and_restored_after_it(
    deterministic: bool, tf32: bool | None, wanted: tuple[bool, ...]
) -> None:
    before = switches()
    with arithmetic(GPU, deterministic=deterministic, tf32=tf32):
        assert switches() == wanted
    assert switches() == before
    with pytest.raises(ZeroDivisionError), arithmetic(GPU, deterministic=deterministic, tf32=tf32):
        raise ZeroDivisionError
    assert switches() == before


def test_products_on_the_cpu_keep_their_precision() -> None:
    # The server computes on the CPU. `torch.set_float32_matmul_precision` would change its products too.
    with arithmetic(GPU, deterministic=False, tf32=True):
        assert torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
        assert torch.get_float32_matmul_precision() == "high"  # torch's compiler reads it


def test_nothing_is_set_for_the_cpu() -> None:
    before = switches()
    with arithmetic(CPU, deterministic=True, tf32=True):
        assert switches() == before


def test_an_operation_without_a_deterministic_algorithm_is_named() -> None:
    with (
        pytest.raises(
            ConfigError, match=r"machine\.deterministic = true: .*put_.*set machine\.deterministic"
        ),
        arithmetic(GPU, deterministic=True, tf32=None),
    ):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), arithmetic(GPU, deterministic=True, tf32=True):
        torch.ones(2, 3) @ torch.ones(2, 3)


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch has one interface")
def test_a_precision_that_was_set_by_the_other_interface_is_refused() -> None:
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision = "tf32"
    try:
        with (
            pytest.raises(ConfigError, match=r"machine\.tf32 = true: this process has set fp32_precision"),
            arithmetic(GPU, deterministic=False, tf32=True),
        ):
            pass
    finally:
        matmul.fp32_precision = "ieee"


def test_the_variable_of_cublas_is_set_before_the_gpu_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")  # so that it is removed after the test
    monkeypatch.delenv(VARIABLE)
    for device, deterministic in ((CPU, True), (GPU, False)):
        prepare(device, deterministic=deterministic)
        assert VARIABLE not in os.environ
    prepare(GPU, deterministic=True)
    assert os.environ[VARIABLE] == ":4096:8"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    prepare(GPU, deterministic=True)  # a second run in the same process


def test_another_value_of_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, ":0:0")
    with pytest.raises(ConfigError, match=f"variable {VARIABLE} is ':0:0'; set it to ':4096:8'"):
        prepare(GPU, deterministic=True)
    monkeypatch.setenv(VARIABLE, ":16:8")
    prepare(GPU, deterministic=True)


def test_a_process_that_used_the_gpu_before_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(
        ConfigError, match=re.escape(f"start a new process, with the environment variable {VARIABLE}")
    ):
        prepare(GPU, deterministic=True)


@pytest.mark.parametrize(("key", "value"), [("deterministic", True), ("tf32", True), ("tf32", False)])
def test_keys_of_gpus_are_refused_for_other_devices(toy_table: Table, key: str, value: bool) -> None:
    words = rf"machine\.{key} = {str(value).lower()} is for NVIDIA GPUs, and machine\.device = 'cpu'"
    with pytest.raises(ConfigError, match=words):
        read(toy_table, {"machine.device": "cpu", f"machine.{key}": value})


def test_keys_without_effect_on_the_device_that_was_found_are_noted() -> None:
    [deterministic, tf32] = device_notes(MachineSettings(deterministic=True, tf32=False))
    assert "machine.deterministic = true has no effect here" in deterministic
    assert "machine.tf32 = false has no effect here" in tf32
    assert device_notes(MachineSettings()) == []


def test_flash_attention_is_not_deterministic(toy_table: Table) -> None:
    overrides = {
        "model.attention": "flash_attention_2",
        "model.dtype": "bfloat16",
        "machine.device": "cuda",
        "machine.deterministic": True,
    }
    with pytest.raises(
        ConfigError, match=r"machine\.deterministic = true: the gradients of model\.attention"
    ):
        read(toy_table, overrides)
