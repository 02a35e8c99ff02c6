"""Everything that would make client-level privacy false is refused, with the key and the reason."""

from pathlib import Path
from typing import Any

import pytest

from fedsmoothlora import methods
from fedsmoothlora.config import ConfigError, read

ON: dict[str, Any] = {"unit": "client", "clip_norm": 1.0, "noise_multiplier": 1.1, "delta": 1e-5}


def table(**sections: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "private",
        "model": {"source": "models/tiny"},
        "data": {"source": "data", "test": "test"},
        "privacy": ON,
        **sections,
    }


def without(key: str) -> dict[str, dict[str, Any]]:
    return {"privacy": {name: value for name, value in ON.items() if name != key}}


def refusal(**sections: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        read(table(**sections))
    return str(error.value)


def test_full_participation_and_poisson_sampling_are_accepted() -> None:
    assert read(table()).participation.sample_rate == 1.0
    config = read(table(participation={"sampling": "poisson", "fraction": 0.2}))
    assert config.participation.sample_rate == 0.2
    assert config.participation.partial(3)
    assert read(table(uploads={"max_norm_factor": float("inf")})).privacy.on


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"participation": {"clients": 3}}, ["participation.clients = 3", "poisson"]),
        ({"participation": {"fraction": 0.5}}, ["participation.fraction = 0.5", "poisson"]),
        ({"participation": {"sampling": "poisson"}}, ["needs participation.fraction"]),
        (
            {"participation": {"sampling": "poisson", "clients": 2, "fraction": 0.1}},
            ["participation.clients = 2"],
        ),
        ({"uploads": {"clip_to_median": True}}, ["uploads.clip_to_median", "other clients' uploads"]),
        ({"uploads": {"max_norm_factor": 5.0}}, ["uploads.max_norm_factor = 5", "other clients' uploads"]),
        ({"uploads": {"max_weight": 0.5}}, ["uploads.max_weight = 0.5"]),
        ({"uploads": {"min_clients": 2}}, ["uploads.min_clients = 2", "repeat"]),
        ({"server": {"aggregation": "median"}}, ["server.aggregation = 'median'"]),
        ({"server": {"aggregation": "multi_krum", "byzantine": 1}}, ["server.aggregation = 'multi_krum'"]),
        ({"evaluation": {"clients": True}}, ["evaluation.clients"]),
        ({"evaluation": {"diagnostics": True}}, ["evaluation.diagnostics"]),
        ({"evaluation": {"personal_steps": 3}}, ["evaluation.personal_steps = 3"]),
        ({"personal": {"ditto": 0.1}}, ["personal.ditto = 0.1", "neither measured nor exported"]),
        ({"evaluation": {"test": False}}, ["evaluation.test = false"]),
        ({"data": {"source": "d", "validation": 0.1}}, ["data.validation = 0.1"]),
        ({"lora": {"client_ranks": "by_size"}}, ["lora.client_ranks"]),
        (
            {"method": {"name": "fedsmoothlora", "gradient_aligned": "shared"}},
            ["gradients leave the clients"],
        ),
        (
            {"method": {"name": "fedsmoothlora", "client_feedback": True, "zeta": 0.0}},
            ["method.client_feedback"],
        ),
        ({"method": {"name": "fedex"}}, ["two noised releases"]),
        ({"method": {"name": "fedsa"}}, ["no global model"]),
        (
            {"method": {"name": "full"}, "training": {"scaffold": True, "momentum": 0.0}},
            ["training.scaffold = true", "control variates leave"],
        ),
        ({"privacy": {**ON, "target_epsilon": 3.0}}, ["privacy.noise_multiplier = 1.1", "give one of them"]),
        (
            without("noise_multiplier"),
            ["needs privacy.noise_multiplier"],
        ),
        (without("clip_norm"), ["needs privacy.clip_norm"]),
        (without("delta"), ["needs privacy.delta"]),
        ({"privacy": {**ON, "noise_multiplier": 0.0}}, ["noise_multiplier"]),
        ({"privacy": {**ON, "clip_quantile": 1.0}}, ["clip_quantile"]),
        ({"privacy": {**ON, "quantile_noise": 1.0}}, ["quantile_noise = 1 belongs to privacy.clip_quantile"]),
        (
            {
                "privacy": {**ON, "clip_quantile": 0.5},
                "method": {"name": "fedit"},
                "transport": {"bits": 4},
            },
            ["privacy.clip_quantile = 0.5", "clients clip changes of factors before they code them"],
        ),
        ({"privacy": {**ON, "sample_rate": 0.1}}, ["privacy.sample_rate = 0.1 belongs to", "'sample'"]),
        ({"privacy": {**ON, "public_counts": True}}, ["privacy.public_counts = true belongs to", "'sample'"]),
        ({"privacy": {"clip_quantile": 0.5}}, ["privacy.clip_quantile = 0.5 belongs to privacy.unit"]),
        ({"privacy": {"clip_norm": 1.0}}, ["privacy.clip_norm = 1.0 belongs to privacy.unit = 'client'"]),
        (
            {"privacy": {}, "participation": {"sampling": "poisson", "fraction": 0.5}},
            ["belongs to privacy.unit"],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_breaks_the_guarantee_is_refused(sections: dict[str, Any], words: list[str]) -> None:
    message = refusal(**sections)
    for word in words:
        assert word in message


@pytest.mark.parametrize("method", methods.names())
def test_every_method_is_private_or_refused_with_a_reason(method: str) -> None:
    traits = methods.find(method).traits
    if traits.uses_mean_only:
        assert read(table(method={"name": method})).method.name == method
        assert traits.global_model
        assert not traits.no_privacy_reason
    else:
        assert traits.no_privacy_reason
        assert (
            f"method '{method}' does not work with privacy.unit = 'client': {traits.no_privacy_reason}"
            in refusal(method={"name": method})
        )


def test_delta_must_be_below_one_over_the_number_of_clients() -> None:
    settings = read(table(privacy={**ON, "delta": 0.1})).privacy
    settings.check(9)
    with pytest.raises(ConfigError, match=r"privacy.delta = 0.1 with 10 clients.*below 1/10"):
        settings.check(10)


def test_the_keys_are_written_and_read_back(tmp_path: Path) -> None:
    from fedsmoothlora.config import to_toml

    file = tmp_path / "config.toml"
    file.write_text(to_toml(read(table())), encoding="utf-8")
    assert read(file).privacy == read(table()).privacy
