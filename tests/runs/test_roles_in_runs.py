"""A run records the names of the layers that a role is for its model."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import TensorDataset

from fedsmoothlora import Federation
from fedsmoothlora.config import read, read_run_config
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.runs.check import check
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.session import run
from layer_names import QKV

ROLE = {"lora.target_modules": ["attention-qkv"], "lora.r": 1, "training.rounds": 2}
NAMES = QKV


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_check_shows_the_names(toy_table: dict[str, Any]) -> None:
    console = quiet()
    check(read(toy_table, ROLE), console)
    assert isinstance(console.file, io.StringIO)
    assert f"names of this model's layers: {', '.join(QKV)}" in console.file.getvalue()


def test_a_run_records_names_and_equals_one_with_names(toy_table: dict[str, Any], tmp_path: Path) -> None:
    run(toy_table, ROLE, out=tmp_path / "role", console=quiet(), outputs=False)
    named = {**ROLE, "lora.target_modules": list(NAMES)}
    run(toy_table, named, out=tmp_path / "names", console=quiet(), outputs=False)
    assert read_run_config(tmp_path / "role" / "config.toml").lora.target_modules == NAMES
    for file in ("config.toml", "updates/0002.safetensors"):
        assert (tmp_path / "role" / file).read_bytes() == (tmp_path / "names" / file).read_bytes()


@pytest.mark.parametrize("given", [True, False], ids=["configuration given", "from the folder"])
def test_a_run_with_a_role_is_resumed(toy_table: dict[str, Any], tmp_path: Path, given: bool) -> None:
    run(toy_table, ROLE, out=tmp_path / "run", console=quiet(), outputs=False)
    config, changes = (toy_table, ROLE) if given else (None, None)
    run(config, changes, resume=tmp_path / "run", console=quiet(), outputs=False)
    if given:
        with pytest.raises(ConfigError, match=r"lora\.target_modules differs"):
            run(toy_table, {**ROLE, "lora.target_modules": ["mlp"]}, resume=tmp_path / "run", console=quiet())


def test_a_plan_has_names_in_place_of_roles(toy_table: dict[str, Any]) -> None:
    toy_table["lora"]["target_modules"] = "mlp"
    assert plan(read(toy_table)).config.lora.target_modules == ("fc1", "fc2")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"self_attn": Mixing(), "up": nn.Linear(4, 4)}) for _ in "ab"
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer["up"](layer["self_attn"](x))
        return self.head(x)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.query(x) * self.key(x) + self.value(x)


def test_a_federation_of_an_own_model_takes_roles(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, 4), torch.arange(12) % 2)
    model = Net()

    def federation(*targets: str) -> Federation:
        settings: dict[str, Any] = {
            "lora": {"r": 1, "target_modules": targets},
            "training": {"rounds": 1, "steps": 1, "batch_size": 4},
            "machine": {"threads": 1, "device": "cpu"},
        }
        return Federation(model, [data, data], test=data, head=["head"], method="fedit", **settings)

    asked = federation("attention")
    assert asked.settings.lora.target_modules == ("query", "key", "value")
    asked.run(tmp_path / "run", console=quiet())
    federation("attention").run(tmp_path / "run", resume=True, console=quiet())
    assert federation("mlp").settings.lora.target_modules == ("up",)
