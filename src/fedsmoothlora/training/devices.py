"""The device that clients train on."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from fedsmoothlora.errors import ConfigError
from fedsmoothlora.training.device_names import wrong_name

CPU = torch.device("cpu")


def resolved(name: str, key: str = "machine.device") -> torch.device:
    """The device of this machine that ``machine.device`` names.

    ``auto`` is torch's current GPU if it finds one with CUDA or ROCm, otherwise the CPU: norms and losses are
    summed in float64, which Apple's GPUs lack. ``cuda`` is torch's current GPU.

    Raises ``ConfigError``, which calls the option ``key``, if this machine has no such device or the name is
    of none.
    """
    if (reason := wrong_name(name)) is not None:
        raise ConfigError(f"{key} = {name!r}: {reason}")
    if name == "cpu":
        return CPU
    found = torch.accelerator.current_accelerator(check_available=True)
    is_gpu = found is not None and found.type == "cuda"
    if name == "auto":
        return torch.device("cuda") if is_gpu else CPU  # the current GPU stays the user's choice
    wanted = torch.device(name)
    if not is_gpu:
        there = "no accelerator" if found is None else f"the accelerator {found.type!r}"
        raise ConfigError(
            f"{key} = {name!r}: torch {torch.__version__} finds {there} on this machine; take 'auto', or "
            "install a build of torch for the accelerator and its driver"
        )
    if wanted.index is not None and wanted.index >= (count := torch.accelerator.device_count()):
        raise ConfigError(f"{key} = {name!r}: this machine has {count} GPUs, numbered 0 to {count - 1}")
    return wanted


def described(name: str) -> str:
    """The device that ``machine.device`` names here, in words: ``cuda:1 (NVIDIA H200)``.

    Raises ``ConfigError`` as `resolved` does.
    """
    device = resolved(name)
    if device.type != "cuda":
        return device.type
    index = torch.cuda.current_device() if device.index is None else device.index
    return f"cuda:{index} ({torch.cuda.get_device_name(index)})"


def accelerator_for(name: str) -> Accelerator:
    """Accelerate's handle of the device that ``machine.device`` names.

    A GPU with a number becomes torch's current GPU, which is the one that accelerate takes. Losses are never
    divided or scaled, whatever accelerate's environment variables say.

    Raises:
        ConfigError: this machine has no such device, this process trained on another kind of device before
            (accelerate keeps one kind for each process), or accelerate was told to compute in float16.
    """
    device = resolved(name)
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)
    # Given, so that ACCELERATE_GRADIENT_ACCUMULATION_STEPS is not read.
    whole = GradientAccumulationPlugin(num_steps=1)
    try:
        accelerator = Accelerator(cpu=device.type == "cpu", gradient_accumulation_plugin=whole)
    except ValueError:  # accelerate holds an accelerator, and the CPU is wanted
        raise ConfigError(_taken(name, "an accelerator")) from None
    if accelerator.scaler is not None:
        raise ConfigError(
            "accelerate is set to mixed precision 'fp16', which scales losses: remove the environment "
            "variable ACCELERATE_MIXED_PRECISION, and set training.precision"
        )
    if accelerator.device.type != device.type:
        raise ConfigError(_taken(name, f"{accelerator.device.type!r}"))
    return accelerator


def _taken(name: str, used: str) -> str:
    return (
        f"machine.device = {name!r}: this process has trained on {used} before, and accelerate keeps one "
        "kind of device for each process; start a new process"
    )
