"""Variants as users write them."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsmoothlora.errors import ConfigError
from fedsmoothlora.experiments.variants import Variant, collect, parsed, read_variants, to_toml

FILE = """
[[variant]]
method.name = "fedit"
training.lr = 0.01

[[variant]]
label = "zeta0"
method.name = "fedsmoothlora"
method.zeta = 0.0
lora.target_modules = ["q_proj", "v_proj"]
"""


def test_methods_texts_and_files_go_together(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(FILE)
    found = collect(["ffa", "hot: frlora training.lr=0.1 lora.target_modules='[\"q_proj\"]'", str(file)])
    assert found == [
        Variant("ffa", {"method.name": "ffa"}),
        Variant("hot", {"method.name": "frlora", "training.lr": 0.1, "lora.target_modules": ["q_proj"]}),
        Variant("fedit", {"method.name": "fedit", "training.lr": 0.01}),
        Variant(
            "zeta0",
            {
                "method.name": "fedsmoothlora",
                "method.zeta": 0.0,
                "lora.target_modules": ["q_proj", "v_proj"],
            },
        ),
    ]


@given(
    st.dictionaries(
        st.sampled_from(["training.lr", "method.gamma", "lora.r", "lora.target_modules", "method.start"]),
        st.integers(1, 9) | st.floats(0.1, 9) | st.booleans() | st.just("exact") | st.just(["a", "b"]),
    )
)
def test_a_written_file_is_read_back_unchanged(tmp_path_factory: Any, overrides: dict[str, Any]) -> None:
    variants = [
        Variant("one", {"method.name": "fedsmoothlora", **overrides}),
        Variant("other", {"method.name": "fedit"}),
    ]
    file = tmp_path_factory.mktemp("variants") / "written.toml"
    file.write_text(to_toml(variants))
    assert read_variants(file) == variants


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "nothing to compare"),
        (["fedits"], "did you mean 'fedit'"),
        (["a: fedits"], "did you mean 'fedit'"),
        (["a:"], "write LABEL: METHOD"),
        (["a: training.lr=0.1"], "write LABEL: METHOD"),
        (["a: fedit training.lr"], "KEY=VALUE"),
        (["a: fedit training.lr="], "training.lr has no value; to remove a key"),
        (["a: fedit 'training.lr=1"], "No closing quotation"),
        (["fedit", "FedIt: fedit training.lr=1"], "two variants are called 'fedit'"),
        (["a/b: fedit"], "a label names a folder"),
        (["..: fedit"], "a label names a folder"),
        (["a: fedit seed=3"], "sets seed, which must be the same for all"),
        (["a: fedit data.train_rows=3"], "sets data.train_rows"),
        (["a: fedit task.max_length=8"], "sets task.max_length"),
        (["a: fedit training.rounds=3"], "sets training.rounds"),
        (["a: fedit evaluation.test=false"], "sets evaluation.test"),
        (["gone.toml"], "gone.toml: there is no such file"),
    ],
)
def test_invalid_variants_are_refused(given: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        collect(given)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no [[variant]]"),
        ("variant = 3", "has no [[variant]]"),
        ("[[variant]]\ntraining.lr = 1.0", "number 1 needs method.name"),
        ('[[variant]]\nmethod.name = "fedid"', "did you mean 'fedit'"),
        ("[[variant", "cannot be read as TOML"),
    ],
)
def test_an_invalid_file_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_variants(file)
    assert said in str(error.value)
    assert "mine.toml" in str(error.value)


def test_a_learning_rate_may_differ_and_so_may_lora() -> None:
    parsed("a: fedit training.lr=0.1 training.max_grad_norm=1.0 lora.r=4").check()
