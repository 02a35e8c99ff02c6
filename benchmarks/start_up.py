"""User seconds until the command line has something to say, against the imports that it cannot avoid."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

from benchmarks.rows import Row

_REPETITIONS = 5
_PROGRAM = "from fedsmoothlora.cli import main; main()"
_IMPORTS = "import torch, peft; from transformers.models.dinov2.modeling_dinov2 import Dinov2Model"
_ADAPTED = f"""{_IMPORTS}
from transformers import Dinov2Config
with torch.device("meta"):
    model = Dinov2Model(Dinov2Config())
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
"""


def rows() -> Iterator[Row]:
    """The help page, the check of a recipe without measuring a batch, and the first line of a run."""
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "torch": ["-c", "import torch"],
            "imports": ["-c", _IMPORTS],
            "adapted": ["-c", _ADAPTED],
            "help": ["-c", _PROGRAM, "--help"],
            "check": ["-c", _PROGRAM, "check", "quickstart", "--no-measure"],
            "run": ["-c", _PROGRAM, "run", "quickstart", "--out"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for repetition in range(_REPETITIONS + 1):
            for name, command in commands.items():
                runs = name == "run"
                out = [f"{folder}/{repetition}"] if runs else []
                found = _user_seconds([*command, *out], until_first_line=runs)
                if repetition:  # the first fills caches
                    times[name].append(found)
    median = {name: statistics.median(found) for name, found in times.items()}
    yield Row(name="help against torch", value=median["help"], unit="s", against=median["torch"])
    for name, title in (("check", "check quickstart --no-measure"), ("run", "first line of run quickstart")):
        yield Row(
            name=f"{title}: against importing torch, PEFT and a model class",
            value=median[name],
            unit="s",
            against=median["imports"],
            target=f"at most {1 + 0.3 / median['imports']:.2f}: 0.3 s more",
        )
        yield Row(
            name=f"{title}: against the same with an adapted model without weights",
            value=median[name],
            unit="s",
            against=median["adapted"],
        )


def _user_seconds(arguments: Sequence[str], *, until_first_line: bool) -> float:
    """User seconds of a process, which is killed after its first line if that is all that matters."""
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        if until_first_line:
            assert process.stdout.readline()
            process.kill()
        else:
            process.stdout.read()
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
    return usage.ru_utime
