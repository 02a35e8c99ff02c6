"""Everything that needs a single upload, or that would show one, is refused with secure aggregation."""

from typing import Any

import pytest

from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.federation.settings import PrivacySettings
from fedsmoothlora.flower.app_folder import with_defences

pytest.importorskip("flwr")

ON = {"secure_aggregation": True}


def table(**sections: Any) -> dict[str, Any]:
    return {
        "name": "masked",
        "model": {"source": "pkg:dinov2-small"},
        "data": {"source": "pkg:mnist-5k"},
        "method": {"name": "fedit"},
        "privacy": ON,
        **sections,
    }


BOTH = {**ON, "unit": "client", "clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}
SUBSPACE = {"name": "fedsmoothlora", "exchange": "subspace", "zeta": 0.0}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"method": SUBSPACE},
        {"server": {"optimizer": "adam"}},
        {"privacy": {**ON, "threshold": 3, "mask_range": 1.0, "most_rows": 1000}},
        {"participation": {"clients": 4}},
    ],
    ids=["fedit", "subspace", "adam", "keys", "partial"],
)
def test_it_works_with_methods_of_sums(sections: dict[str, Any]) -> None:
    config = read(table(**sections))
    assert config.privacy.uploads_only
    assert config.privacy.hides_counts
    assert not config.privacy.on


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"method": {"name": "flora"}}, ["'flora' does not work", "averages products"]),
        ({"method": {"name": "fedsmoothlora"}}, ["set method.exchange = 'subspace'"]),
        ({"method": {"name": "fedsa"}}, ["without a global model"]),
        ({"transport": {"bits": 16}}, ["transport.bits = 16", "use 32"]),
        ({"transport": {"bits": 4}}, ["transport.bits = 4", "one scale for all clients"]),
        ({"server": {"aggregation": "median"}}, ["server.aggregation = 'median'", "single uploads"]),
        ({"uploads": {"clip_to_median": True}}, ["uploads.clip_to_median", "single uploads"]),
        ({"uploads": {"max_norm_factor": 3.0}}, ["uploads.max_norm_factor = 3", "privacy.mask_range"]),
        ({"uploads": {"max_weight": 0.5}}, ["uploads.max_weight = 0.5", "privacy.most_rows"]),
        ({"uploads": {"min_clients": 2}}, ["uploads.min_clients = 2", "privacy.threshold"]),
        ({"participation": {"clients": 3, "buffer": 2}}, ["participation.buffer = 2", "in the same round"]),
        ({"evaluation": {"clients": True}}, ["evaluation.clients", "nothing but uploads"]),
        ({"evaluation": {"diagnostics": True}}, ["evaluation.diagnostics", "nothing but uploads"]),
        ({"evaluation": {"personal_steps": 1}}, ["evaluation.personal_steps", "nothing but uploads"]),
        ({"evaluation": {"test": False}}, ["only a test set"]),
        ({"data": {"source": "pkg:mnist-5k", "validation": 0.1}}, ["data.validation", "nothing but uploads"]),
        ({"personal": {"ditto": 0.1}}, ["personal.ditto", "nothing but uploads"]),
        ({"privacy": {**BOTH, "most_rows": 9}}, ["privacy.most_rows = 9", "all clients weigh the same"]),
        (
            {"privacy": {**BOTH, "mask_range": 2.0}},
            ["privacy.mask_range = 2", "clip_norm bounds every number"],
        ),
        ({"privacy": {**BOTH, "clip_quantile": 0.5}}, ["privacy.clip_quantile = 0.5", "sees no norm"]),
        (
            {"privacy": BOTH, "participation": {"sampling": "poisson", "fraction": 0.5}},
            ["participation.sampling = 'poisson'", "nobody is drawn in secret"],
        ),
        (
            {"privacy": BOTH, "method": SUBSPACE},
            ["privacy.unit = 'client' does not work", "two releases", "such as 'fedit'"],
        ),
        (
            {"privacy": {"threshold": 3}},
            ["privacy.threshold = 3 belongs to privacy.secure_aggregation"],
        ),
        ({"privacy": {"mask_range": 1.0}}, ["privacy.mask_range = 1.0 belongs to"]),
        ({"privacy": {"most_rows": 9}}, ["privacy.most_rows = 9 belongs to"]),
        ({"flower": {"clients": ["a", "b"]}}, ["2 clients in a round", "at least 3"]),
        (
            {"flower": {"clients": ["a", "b", "c", "d"]}, "privacy": {**ON, "threshold": 2}},
            ["privacy.threshold = 2 with 4 clients", "from 3 to 4"],
        ),
        (
            {"training": {"scaffold": True, "optimizer": "sgd", "momentum": 0.0}},
            ["training.scaffold", "beside the uploads"],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_needs_single_uploads_is_refused(sections: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read(table(**sections))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("clients", "threshold"), [(3, 2), (4, 3), (5, 4), (6, 4), (10, 7), (50, 34)])
def test_two_thirds_of_a_round_are_the_threshold_unless_set(clients: int, threshold: int) -> None:
    settings = PrivacySettings(secure_aggregation=True)
    assert settings.threshold_of(clients) == threshold
    settings.check_session(clients)


def test_a_client_weighs_by_its_rows_up_to_a_public_number() -> None:
    settings = PrivacySettings(secure_aggregation=True, most_rows=100)
    assert [settings.weight_of(rows) for rows in (1, 50, 100, 1000)] == [0.01, 0.5, 1.0, 1.0]
    assert PrivacySettings(secure_aggregation=True).weight_of(7) == 1.0


def test_the_coordinators_folder_gets_no_defences_that_need_single_uploads() -> None:
    config = read(table(flower={"clients": ["a", "b", "c"]}))
    assert with_defences(config) == config


def test_a_defence_that_the_method_refuses_is_left_out() -> None:
    shared = {"name": "fedsmoothlora", "exchange": "subspace", "zeta": 0.0}
    clear = {"unit": "none"}
    config = read(table(flower={"clients": ["a", "b", "c"]}, method=shared, privacy=clear))
    assert with_defences(config) == config
    exact = read(table(flower={"clients": ["a", "b", "c"]}, method={"name": "fedit"}, privacy=clear))
    assert with_defences(exact).uploads.clip_to_median
