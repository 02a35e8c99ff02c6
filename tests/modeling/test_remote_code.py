"""Code that comes with a model is never run, and nobody is asked whether it may be."""

import ast
import json
from pathlib import Path

import pytest

import fedsmoothlora
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.modeling.loading import model_config
from fedsmoothlora.modeling.settings import ModelSettings

# Calls that run a repository's code, or ask for it, unless ``trust_remote_code`` is False.
CLASSES = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "auto")


def test_a_model_with_code_of_its_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}})
    )
    (tmp_path / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'run')!r}).touch()\n"
        "from transformers import PretrainedConfig\nclass OwnConfig(PretrainedConfig): model_type = 'own'\n"
    )
    with pytest.raises(ConfigError, match=r"model\.source"):
        model_config(ModelSettings(source=str(tmp_path)))
    assert not (tmp_path / "run").exists()


def test_every_call_of_transformers_refuses_remote_code() -> None:
    calls = 0
    for file in Path(fedsmoothlora.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr not in ("from_pretrained", "from_config") or not isinstance(
                node.func.value, ast.Name
            ):
                continue
            if node.func.value.id in CLASSES:
                calls += 1
                given = [ast.unparse(one) for one in node.keywords]
                assert "trust_remote_code=False" in given, f"{file}:{node.lineno}"
    assert calls == 8
