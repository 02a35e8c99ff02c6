"""Old configurations are rewritten with the new names of their keys."""

import tomllib

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from fedsmoothlora.config.migration import migrated
from fedsmoothlora.config.renamed import translated
from fedsmoothlora.errors import ConfigError

RENAMED = {
    "training.learning_rate": "training.lr",
    "adapters": "lora",  # before the keys that move into it
    "rank": "lora.r",
    "clients.number": "partition.clients",
    "data.limit": "data.train_rows",
    "training.steps_per_round": "training.steps",
}


def test_a_file_without_old_keys_stays_as_it_is() -> None:
    text = '# A comment.\nname = "toy"  # here\r\n\n[training]\nlr = 0.1'
    assert migrated(text, RENAMED) == text
    assert migrated(text) == text


def test_a_key_is_renamed_in_place_and_comments_stay() -> None:
    old = "# Mine.\n[training]\n# the rate\nlearning_rate=0.1  # learning_rate was 0.2\nrounds = 3\n"
    new = "# Mine.\n[training]\n# the rate\nlr=0.1  # learning_rate was 0.2\nrounds = 3\n"
    assert migrated(old, RENAMED) == new


def test_a_section_is_renamed_with_its_subsections_and_other_names_that_begin_alike_stay() -> None:
    old = "[adapters]  # LoRA\nr = 4\n[adapters.more]\nx = 1\n[adapters-2]\nr = 5\n"
    new = "[lora]  # LoRA\nr = 4\n[lora.more]\nx = 1\n[adapters-2]\nr = 5\n"
    assert migrated(old, RENAMED) == new


def test_a_key_moves_with_its_comment_to_another_section() -> None:
    old = 'name = "x"\n# of LoRA\nrank = 4\n\n[lora]\nalpha = 8\n\n[training]\nlr = 1\n'
    new = 'name = "x"\n\n[lora]\nalpha = 8\n# of LoRA\nr = 4\n\n[training]\nlr = 1\n'
    assert migrated(old, RENAMED) == new


def test_a_section_that_is_missing_is_added_at_the_end() -> None:
    assert migrated("[clients]\nnumber = 3\n", RENAMED) == "[clients]\n\n[partition]\nclients = 3\n"


def test_values_over_several_lines_are_kept_whole() -> None:
    old = '[data]\ntext = """\nlimit = 5\n[training]\n"""\nlimit = 7\nnames = [\n  "limit = 1",\n]\n'
    assert migrated(old, RENAMED) == old.replace("limit = 7", "train_rows = 7")


def test_dotted_keys_are_renamed_in_place() -> None:
    assert migrated("training.learning_rate = 0.1\n", RENAMED) == "training.lr = 0.1\n"


@pytest.mark.parametrize("text", ["training = {learning_rate = 0.1}", '["training"]\n"learning_rate" = 1\n'])
def test_other_forms_are_refused_with_the_names(text: str) -> None:
    with pytest.raises(ConfigError, match=r"by hand: training\.learning_rate to training\.lr"):
        migrated(text, RENAMED)


def test_an_old_key_beside_its_new_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="both set"):
        migrated("[training]\nlearning_rate = 0.1\nlr = 0.2\n", RENAMED)


def test_text_that_is_not_toml_is_refused() -> None:
    with pytest.raises(ConfigError, match="not valid TOML"):
        migrated("[training\n", RENAMED)


TEXTS = st.text('a=#["\n\x27é', max_size=6)
VALUES = st.one_of(st.integers(-9, 9), st.booleans(), TEXTS, st.lists(TEXTS, max_size=3))
OLD = st.fixed_dictionaries(
    {},
    optional={
        "rank": VALUES,
        "training": st.dictionaries(st.sampled_from(["learning_rate", "rounds", "steps_per_round"]), VALUES),
        "adapters": st.dictionaries(st.sampled_from(["alpha", "dropout"]), VALUES),
        "clients": st.dictionaries(st.sampled_from(["number", "other"]), VALUES),
        "data": st.dictionaries(st.sampled_from(["limit", "source"]), VALUES),
    },
)


@given(OLD)
def test_a_migrated_file_has_the_values_of_a_translated_run_folder(table: dict[str, object]) -> None:
    assert tomllib.loads(migrated(tomli_w.dumps(table), RENAMED)) == translated(table, RENAMED)


@pytest.mark.parametrize(("old", "new"), [('"bfloat16"', 16), ("'float32'", 32)])
def test_a_value_that_has_another_name_today_is_rewritten_too(old: str, new: int) -> None:
    text = f"[transport]\n# half\ndtype = {old}  # the bytes\n"
    assert migrated(text) == f"[transport]\n# half\nbits = {new}  # the bytes\n"
    assert migrated(f"transport.dtype = {old}\n") == f"transport.bits = {new}\n"
