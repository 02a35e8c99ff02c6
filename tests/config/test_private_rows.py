"""Everything that would make sample-level privacy false is refused, with the key and the reason."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedsmoothlora import methods
from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.federation.settings import PrivacySettings

ON: dict[str, Any] = {
    **{"unit": "sample", "clip_norm": 1.0, "noise_multiplier": 1.1, "delta": 1e-5, "sample_rate": 0.05}
}
PUBLIC = {**{key: value for key, value in ON.items() if key != "sample_rate"}, "public_counts": True}


def table(**sections: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "private",
        "model": {"source": "models/tiny"},
        "data": {"source": "data", "test": "test"},
        "method": {"name": "fedit"},
        "training": {"steps": 10},
        "privacy": ON,
        **sections,
    }


def refusal(**sections: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        read(table(**sections))
    return str(error.value)


def test_private_and_public_counts_are_accepted() -> None:
    assert read(table()).privacy.hides_counts
    config = read(table(privacy=PUBLIC, training={"epochs": 2}, lora={"client_ranks": "by_size"},
                        method={"name": "hetlora"}))  # fmt: skip
    assert not config.privacy.hides_counts
    assert config.privacy.hides_rows


def test_what_only_depends_on_uploads_stays_allowed() -> None:
    """Uploads are private by themselves, so the server may compare them and draw clients as it likes."""
    config = read(
        table(
            server={"aggregation": "multi_krum", "byzantine": 1},
            uploads={"clip_to_median": True, "max_norm_factor": 3.0, "min_clients": 5},
            participation={"clients": 5},
            transport={"bits": 16},
        )
    )
    assert config.privacy.hides_rows


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"training": {"epochs": 1}}, ["needs training.steps", "public_counts"]),
        ({"training": {}}, ["needs training.steps"]),
        (
            {"privacy": {key: value for key, value in ON.items() if key != "sample_rate"}},
            ["needs privacy.sample_rate"],
        ),
        ({"privacy": {**PUBLIC, "sample_rate": 0.1}}, ["privacy.sample_rate = 0.1", "give one of them"]),
        (
            {"privacy": {**ON, "clip_quantile": 0.5}},
            ["clip_quantile = 0.5 belongs to"],
        ),
        ({"privacy": {**ON, "target_epsilon": 2.0}}, ["give one of them"]),
        ({"privacy": {"unit": "sample"}}, ["'sample' needs privacy.clip_norm", "needs privacy.delta"]),
        (
            {"participation": {"sampling": "poisson", "fraction": 0.5}},
            ["belongs to privacy.unit = 'client'"],
        ),
        ({"training": {"steps": 1, "gradient_checkpointing": True}}, ["training.gradient_checkpointing"]),
        (
            {"training": {"steps": 1, "tokens_per_batch": 64}},
            ["training.tokens_per_batch = 64", "use training.accumulation"],
        ),
        ({"training": {"steps": 1, "class_weights": "balanced"}}, ["training.class_weights"]),
        ({"lora": {"dropout": 0.1}}, ["lora.dropout = 0.1", "masks"]),
        (
            {"privacy": {**ON, "secure_aggregation": True, "most_rows": 9}},
            ["privacy.most_rows = 9", "number of rows exactly"],
        ),
        ({"uploads": {"max_weight": 0.5}}, ["uploads.max_weight = 0.5"]),
        ({"evaluation": {"clients": True}}, ["evaluation.clients"]),
        ({"evaluation": {"diagnostics": True}}, ["evaluation.diagnostics"]),
        ({"evaluation": {"test": False}}, ["evaluation.test = false"]),
        ({"data": {"source": "d", "validation": 0.1}}, ["data.validation = 0.1"]),
        (
            {"lora": {"client_ranks": "by_size"}, "method": {"name": "hetlora"}},
            ["lora.client_ranks", "'sample'"],
        ),
        (
            {"method": {"name": "fedsmoothlora"}},
            ["gradient_aligned = 'client'", "'weight', 'random'"],
        ),
        (
            {"method": {"name": "fedsmoothlora", "gradient_aligned": "shuffled"}},
            ["gradient_aligned = 'shuffled'", "computed without noise"],
        ),
        ({"method": {"name": "fed_sb"}}, ["'fed_sb' does not work", "computed without noise"]),
        ({"method": {"name": "ravan"}}, ["'ravan' does not work", "a matrix between fixed factors"]),
        ({"task": {"kind": "causal-lm", "packing": True}}, ["task.packing = true"]),
        ({"task": {"kind": "preference"}}, ["task.kind = 'preference'", "pair"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_breaks_the_guarantee_is_refused(sections: dict[str, Any], words: list[str]) -> None:
    message = refusal(**sections)
    for word in words:
        assert word in message


@pytest.mark.parametrize("start", ["weight", "random", "none"])
def test_starts_from_public_values_are_accepted(start: str) -> None:
    method = {"name": "fedsmoothlora", "gradient_aligned": start, "server_feedback": True}
    assert read(table(method=method)).privacy.hides_rows


@pytest.mark.parametrize("method", methods.names())
def test_every_method_hides_rows_or_is_refused_with_a_reason(method: str) -> None:
    reason = methods.find(method)().no_sample_privacy_reason
    if reason:
        expected = f"method '{method}' does not work with privacy.unit = 'sample': {reason}"
        assert expected in refusal(method={"name": method})
    else:
        assert read(table(method={"name": method})).method.name == method


@pytest.mark.parametrize("method", ["fedsa", "local"])
def test_methods_without_a_global_model_are_refused(method: str) -> None:
    # The metrics before training would stand as the run's result, because no others leave a client.
    assert "it has no global model, so its metrics are the clients'" in refusal(method={"name": method})


def test_delta_must_be_below_one_over_the_rows_of_every_client() -> None:
    settings = PrivacySettings(unit="sample", delta=0.01)
    settings.check_rows("a", 99)
    with pytest.raises(ConfigError, match=r"delta = 0.01, and client a has 100 rows.*well below 1/100"):
        settings.check_rows("a", 100)


def test_the_examples_of_the_documentation_are_valid() -> None:
    text = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text(encoding="utf-8")
    blocks = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL)]
    common = {"name": "x", "model": {"source": "m"}, "data": {"source": "d", "test": "t"}}
    found = [read({**common, **one}).privacy for one in blocks]
    assert [one.unit for one in found] == ["client", "client", "sample", "none"]
    assert [one.secure_aggregation for one in found] == [False, False, False, True]
