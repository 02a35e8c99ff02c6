"""Sites of a private federation: every message that leaves them holds the upload and nothing else."""

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from test_flower_engine import Answer, Setting, setting

from fedsmoothlora.config import read, to_toml
from fedsmoothlora.errors import SiteError
from fedsmoothlora.federation.messages import Message as RoundMessage
from fedsmoothlora.flower.app_folder import with_defences
from fedsmoothlora.flower.site import Site

pytest.importorskip("opacus")
__all__ = ["setting"]  # the fixture

PRIVATE = {
    **{"privacy.unit": "client", "privacy.clip_norm": 0.5, "privacy.noise_multiplier": 1.0},
    **{"privacy.delta": 1e-5, "training.rounds": 2, "training.steps": 1},
}
NAMES = {"client", "experiment", "round", "attempt", "exchange", "samples"}


def test_every_message_of_a_site_holds_its_upload_and_nothing_of_its_rows(setting: Setting) -> None:
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
    assert {kind for kind, _ in seen} == {"query.agree", "train"}
    for kind, message in seen:
        tables = {name: dict(table) for name, table in message.content.config_records.items()}
        assert dict(tables.pop("status")) == {"status": "done"}
        assert not message.content.metric_records
        if kind == "query.agree":
            (info,) = tables.values()
            assert (info["samples"], info["validation"], info["histogram"]) == (1, 0, [])
            assert not message.content.array_records
        else:
            (fields,) = tables.values()
            assert fields.keys() == NAMES
            assert fields["samples"] == 1
            assert list(message.content.array_records) == ["tensors"]
    assert (folder / "privacy.json").is_file()


def test_a_site_refuses_to_evaluate_for_a_coordinator_that_asks(tiny_folder: Path, setting: Setting) -> None:
    config: Any = read(setting.grid(PRIVATE).config)
    node = {"client-id": "hospital-a", "data": str(setting.root / "data" / "hospital-a.csv")}
    site = Site.at(config, node, setting.preparation)
    with pytest.raises(SiteError, match="no metric of this client's rows leaves it"):
        site.validate(RoundMessage(experiment="0" * 32, round=0), None)  # type: ignore[arg-type]


def test_the_app_of_a_private_federation_has_a_configuration_that_is_accepted(setting: Setting) -> None:
    """Defences that compare uploads are refused with privacy, so they are not added either."""
    config = read(setting.grid(PRIVATE).config)
    assert read(to_toml_file(with_defences(config), setting.root)) == config
    assert with_defences(read(setting.table)).uploads.clip_to_median


def to_toml_file(config: Any, folder: Path) -> Path:
    file = folder / "again.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    return file
