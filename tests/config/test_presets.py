"""Presets fill in keys of [method] and [transport] that a configuration leaves out, and no others."""

import tomllib
from dataclasses import replace
from typing import Any

import pytest

from fedsmoothlora.config import Sections, first_difference, from_table, read, to_toml
from fedsmoothlora.config.defaults import defaults
from fedsmoothlora.config.presets import fill_in_preset
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.methods.fedsmoothlora import FedSmoothLoRA

BASE = {"name": "x", "model": {"source": "folder"}, "data": {"source": "pkg:mnist-5k"}}


def with_method(**method: Any) -> dict[str, Any]:
    return {**BASE, "method": {"name": "fedsmoothlora", **method}}


@pytest.mark.parametrize("preset", FedSmoothLoRA.presets)
def test_a_preset_fills_in_keys_of_method_and_transport(preset: str) -> None:
    config = read(with_method(preset=preset))
    for dotted, value in FedSmoothLoRA.presets[preset].items():
        section, _, key = dotted.partition(".")
        assert section in ("method", "transport")
        found = config.method.options()[key] if section == "method" else config.transport.bits
        assert found == value, dotted
    plain = read(with_method())
    names = {key.partition(".")[2] for key in FedSmoothLoRA.presets[preset]}
    for key, value in plain.method.options().items():
        if key not in names | {"preset"}:
            assert config.method.options()[key] == value
    assert replace(config, method=plain.method, transport=plain.transport) == plain


def test_paper_is_the_default_method() -> None:
    plain, paper = read(with_method()), read(with_method(preset="paper"))
    assert first_difference(to_toml(plain), to_toml(paper)) is None


def test_low_bit_has_four_bits_feedback_at_the_server_and_stateless_clients() -> None:
    config = read(with_method(preset="low_bit"))
    options = config.method.options()
    assert config.transport.bits == 4
    assert (options["zeta"], options["server_feedback"], options["client_feedback"]) == (0.0, True, False)
    assert options["partial_start"] is True


def test_a_key_that_is_set_beside_a_preset_wins() -> None:
    table = {**with_method(preset="low_bit", zeta=0.5), "transport": {"bits": 3}}
    config = read(table, {"method.partial_start": False})
    options = config.method.options()
    assert (options["zeta"], options["partial_start"], config.transport.bits) == (0.5, False, 3)
    assert read(BASE, {"method.preset": "low_bit", "method.name": "fedsmoothlora"}).transport.bits == 4


def test_the_file_of_a_run_has_the_resolved_keys_and_reads_the_same() -> None:
    config = read(with_method(preset="low_bit", client_feedback=True))
    text = to_toml(config)
    assert 'preset = "low_bit"' in text
    assert "bits = 4" in text
    assert "zeta = 0.0" in text
    assert read(tomllib.loads(text)) == config


def test_a_table_is_changed_only_where_it_names_a_preset() -> None:
    for table in (
        {},
        {"method": {"name": "fedit"}},
        {"method": 3},
        {"method": {"name": "?", "preset": "low_bit"}},
    ):
        before = dict(table)
        fill_in_preset(table)  # type: ignore[arg-type]
        assert table == before


@pytest.mark.parametrize("preset", ["low-bit", 4, True, ""])
def test_a_preset_that_there_is_not_is_refused(preset: Any) -> None:
    with pytest.raises(ConfigError, match=r"method\.preset"):
        read(with_method(preset=preset))


def test_a_method_without_presets_has_no_such_key() -> None:
    with pytest.raises(ConfigError, match=r"method\.preset: unknown key"):
        read({**BASE, "method": {"name": "fedit", "preset": "low_bit"}})


def test_an_object_has_no_preset_since_nothing_says_which_options_were_set() -> None:
    with pytest.raises(ConfigError, match="set the options themselves"):
        from_table(Sections, {"method": FedSmoothLoRA(preset="low_bit")}, "Federation")
    given = from_table(Sections, {"method": {"name": "fedsmoothlora", "preset": "low_bit"}}, "Federation")
    assert given.transport.bits == 4


def test_settings_that_were_written_before_a_key_existed_have_its_default() -> None:
    now = to_toml(read(with_method()))
    old = "\n".join(
        line
        for line in now.splitlines()
        if not line.startswith(("bits =", "client_feedback =", "aggregation ="))
    )
    assert len(old.splitlines()) == len(now.splitlines()) - 3
    assert first_difference(now, old) is None
    other = to_toml(read({**with_method(), "transport": {"bits": 16}}))
    assert first_difference(other, old) == "transport.bits"
    assert first_difference(old, other) == "transport.bits"
    by_old_name = old.replace("[transport]", '[transport]\ndtype = "bfloat16"')
    assert first_difference(other, by_old_name) is None
    assert first_difference(now, by_old_name) == "transport.bits"


def test_the_defaults_of_an_unknown_method_are_not_looked_up() -> None:
    found = defaults({"method": {"name": "my-own"}, "clients": {"a": 1}, "seed": 3, "transport": {}})
    assert found == {"transport.bits": 32}
