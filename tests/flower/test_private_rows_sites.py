"""Sites with sample-level privacy: epsilon arrives with the upload, and no count or loss does."""

from typing import Any

import pytest
from flwr.app import Context, Message
from test_flower_engine import Answer, Setting, setting

from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.flower.app_folder import with_defences
from fedsmoothlora.flower.server_app import check_for_sites
from fedsmoothlora.storage.run_folder import RunFolder

pytest.importorskip("opacus")
__all__ = ["setting"]  # the fixture

PRIVATE: dict[str, Any] = {
    "lora.dropout": 0.0,
    **{"privacy.unit": "sample", "privacy.clip_norm": 0.5, "privacy.noise_multiplier": 1.0},
    **{"privacy.delta": 1e-3, "privacy.sample_rate": 0.25, "training.rounds": 2, "training.steps": 1},
    "method.gradient_aligned": "random",
}
NAMES = {"client", "experiment", "round", "attempt", "exchange", "samples", "metrics:epsilon"}


def test_every_message_of_a_site_holds_upload_and_epsilon_and_nothing_else_of_its_rows(
    setting: Setting,
) -> None:
    grid = setting.grid(PRIVATE)
    seen: list[tuple[str, Message]] = []

    def recorded(message: Message, context: Context, app: Answer) -> Message:
        reply = app(message, context)
        seen.append((message.metadata.message_type, reply))
        return reply

    for node in grid.nodes:
        grid.nodes[node]["histogram"] = True  # the site would show its labels, but privacy goes first
        grid.stand_in[node] = recorded
    folder = setting.coordinate(grid)

    assert [kind for kind, _ in seen].count("train") == 6
    reported = set()
    for kind, message in seen:
        tables = {name: dict(table) for name, table in message.content.config_records.items()}
        assert dict(tables.pop("status")) == {"status": "done"}
        assert not message.content.metric_records
        (values,) = tables.values()
        if kind == "query.agree":
            assert (values["samples"], values["validation"], values["histogram"]) == (1, 0, [])
        else:
            assert kind == "train"
            assert values.keys() == NAMES
            assert values["samples"] == 1
            reported.add(values["metrics:epsilon"])
    metrics = [one for record in RunFolder(folder).records() for one in record.metrics]
    assert {one.value for one in metrics if one.name == "epsilon"} == reported
    assert not any(one.name in ("train_loss", "samples") for one in metrics)


def test_methods_without_a_global_model_have_no_metrics_that_could_leave_the_sites(setting: Setting) -> None:
    config = read(setting.grid(PRIVATE).config, {"method.name": "fedit"})
    check_for_sites(config)
    with pytest.raises(ConfigError, match=r"privacy.unit = 'sample'.*no global model.*do not leave"):
        check_for_sites(read(setting.grid(PRIVATE).config, {"method": {"name": "fedsa"}}))


def test_defences_that_need_counts_are_not_added(setting: Setting) -> None:
    found = with_defences(read(setting.grid(PRIVATE).config)).uploads
    assert found.clip_to_median
    assert found.max_weight is None
