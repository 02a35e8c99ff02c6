"""Runs on chats and instructions, from a configuration: recognition, learning, packing, errors."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet
from rich.console import Console
from transformers import AutoTokenizer

from conftest import byte_tokenizer
from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.exports.generation import load_writer
from fedsmoothlora.runs import session
from fedsmoothlora.runs.check import check
from fedsmoothlora.runs.planning import measurement, plan
from fedsmoothlora.runs.session import run
from fedsmoothlora.tasks.metrics.exact_match import ExactMatch

Table = dict[str, Any]
WORDS = ("red", "blue", "green", "grey")


def messages(number: int) -> list[dict[str, str]]:
    """The assistant repeats the user's word; every third chat has two exchanges."""
    found = []
    for turn in range(2 if number % 3 == 0 else 1):
        word = WORDS[(number + turn) % 4]
        found += [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]
    return found


def rows(count: int = 60) -> list[dict[str, Any]]:
    return [{"messages": messages(n), "who": "north" if n % 2 else "south"} for n in range(count)]


def write(folder: Path, found: list[dict[str, Any]]) -> Path:
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def table(model: Path, source: Path, **task: Any) -> Table:
    return {
        "name": "own",
        "model": {"source": str(model)},
        "lora": {"r": 2, "alpha": 4},
        "data": {"source": str(source), "validation": 0.2},
        "task": {"kind": "causal-lm", "max_length": 96, **task},
        "partition": {"kind": "by_column", "column": "who"},
        "method": {"name": "fedsmoothlora", "gamma": 64, "calibration_batches": 1},
        "training": {"rounds": 2, "steps": 6, "lr": 0.02},
        "machine": {"threads": 1, "device": "cpu"},
    }


def quiet(settings: Any, out: Path) -> session.Result:
    return run(settings, out=out, console=Console(file=io.StringIO()))


def printed(settings: Table) -> str:
    console = Console(file=io.StringIO(), width=200)
    check(read(settings), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_model_learns_from_chats_and_continues_them(tiny_llama: Path, tmp_path: Path) -> None:
    settings = table(
        tiny_llama, write(tmp_path, rows()), metric="exact-match", metric_rows=4, max_new_tokens=4
    )
    result = quiet(settings, tmp_path / "run")
    losses = result.values("loss")
    assert losses[-1] < 0.7 * losses[0]
    assert len(result.values("exact_match")) == 2
    log = (tmp_path / "run" / "run.log").read_text()
    assert "rows are chats (column 'messages'), written by the tokenizer's chat template" in log
    writer = load_writer(tmp_path / "run")
    prompt = writer.prompting.tokens(writer.tokenizer, "say red")
    assert writer.tokenizer.decode(prompt) == "[user]say red<end>\n[assistant]"


@pytest.mark.parametrize("which", ["tiny_llama", "tiny_gpt2"])
def test_packing_changes_nothing_but_rounding(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Losses of training, calibration and evaluation, with unequal numbers of rows and accumulation."""
    settings = table(request.getfixturevalue(which), write(tmp_path, rows(24)))
    settings["training"] |= {"rounds": 2, "steps": 1, "optimizer": "sgd", "lr": 0.01, "accumulation": 2}
    found = []
    for packing in (False, True):
        result = quiet(read(settings, {"task.packing": packing}), tmp_path / f"packing-{packing}")
        names = ("loss", "train_loss_first", "train_loss_last")
        found.append([line["value"] for line in result.metrics if line["name"] in names])
        samples = [line["value"] for line in result.metrics if line["name"] == "samples"]
        assert sum(samples) == 2 * 20
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_template_of_one_s_own_writes_the_chats_and_is_exported(tiny_llama: Path, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
    )
    settings = table(tiny_llama, write(tmp_path, rows(24)), chat_template=template)
    settings["training"] |= {"rounds": 1, "steps": 1}
    quiet(settings, tmp_path / "run")
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").chat_template == template
    writer = load_writer(tmp_path / "run")
    assert writer.tokenizer.decode(writer.prompting.tokens(writer.tokenizer, "x")) == "Q: x<end>A: "


def test_check_says_the_form_the_turns_and_the_rows_that_lose_turns(tiny_llama: Path, tmp_path: Path) -> None:
    source = write(tmp_path, rows(12))
    text = printed(table(tiny_llama, source, max_length=50))
    assert "note: " in text
    assert "rows are chats (column 'messages')" in text
    assert "training chats: 2 to 4 turns, half of them at most 2; 16 turns of the assistant" in text
    assert (
        "training chats longer than task.max_length = 50 tokens: 4 of 12 lose 8 turns at their end, and 0 "
        "are cut within their first exchange" in text
    )
    # A chosen column is not announced.
    assert "rows are chats" not in printed(table(tiny_llama, source, messages="messages"))


def test_empty_turns_of_the_assistant_and_unknown_roles_are_reported(
    tiny_llama: Path, tmp_path: Path
) -> None:
    found = rows(8)
    found[1]["messages"][1]["content"] = " "
    for number in (2, 4):  # chats of one exchange
        found[number]["messages"].insert(0, {"role": "asistant", "content": "hello"})
    notes = plan(read(table(tiny_llama, write(tmp_path, found)))).notes
    assert any("1 of 8 training chats have an empty turn of the assistant" in note for note in notes)
    assert any("2 of 8 training chats have turns of the role 'asistant'" in note for note in notes)
    assert not any("role 'user'" in note for note in notes)


def test_marks_that_leave_out_the_ends_of_turns_are_reported(tiny_llama: Path, tmp_path: Path) -> None:
    content = "{% generation %}{{ m.content }}{% endgeneration %}"
    marked = (
        "{% for m in messages %}{% if m.role == 'user' %}Q{{ m.content }}{% else %}A"
        + content
        + "{% endif %}"
    )
    source = write(tmp_path, rows(8))
    note = "8 of 8 training chats have turns of the assistant whose end is outside the {% generation %} marks"
    for template, is_open in (
        (f"{marked}<end>{{% endfor %}}", True),
        (marked.replace("{% endgen", "<end>{% endgen") + "{% endfor %}", False),
    ):
        notes = plan(read(table(tiny_llama, source, chat_template=template))).notes
        assert any(note in line for line in notes) == is_open


def test_marks_that_leave_out_calls_are_reported(tiny_llama: Path, tmp_path: Path) -> None:
    source = write(tmp_path, [calling("f", x=1), *rows(7)])
    inside = "{% generation %}{{ m.content }}{{ m.tool_calls }}<end>{% endgeneration %}"
    outside = "{% generation %}{{ m.content }}<end>{% endgeneration %}{{ m.tool_calls }}"
    note = "1 of 8 training chats have calls of functions outside the {% generation %} marks"
    for turn in (inside, outside):
        template = (
            "{% for m in messages %}{% if m.role == 'assistant' %}A" + turn + "{% else %}Q{{ m.content }}"
            "{% endif %}{% endfor %}"
        )
        notes = plan(read(table(tiny_llama, source, chat_template=template, max_length=250))).notes
        assert any(note in line for line in notes) == (turn == outside)


def test_sharegpt_and_parquet_give_the_tokens_of_messages(tiny_llama: Path, tmp_path: Path) -> None:
    found = rows(12)
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = [
        {
            "conversations": [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]],
            "who": row["who"],
        }
        for row in found
    ]
    (tmp_path / "sharegpt").mkdir()
    parquet.write_table(pa.Table.from_pylist(found), tmp_path / "own.parquet")
    trained = [
        plan(read(table(tiny_llama, source))).task_data.train
        for source in (
            write(tmp_path, found),
            write(tmp_path / "sharegpt", sharegpt),
            tmp_path / "own.parquet",
        )
    ]
    wanted = [trained[0].row(n) for n in range(12)]  # type: ignore[attr-defined]
    for other in trained[1:]:
        assert [other.row(n) for n in range(12)] == wanted  # type: ignore[attr-defined]


CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def calling(name: str, **arguments: Any) -> dict[str, Any]:
    """A chat that calls a function, and the function."""
    call = {"function": {"name": name, "arguments": arguments}}
    keys = {key: {"type": "integer"} for key in arguments}
    return {
        "messages": [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "It is 2."},
        ],
        "tools": [{"name": name, "parameters": keys}],
        "who": name,
    }


def test_calls_from_parquet_and_saved_data_sets_have_their_own_arguments_only(
    tiny_llama: Path, tmp_path: Path
) -> None:
    found = [calling("f", x=1), calling("g", y=[2, None])] * 4
    tables = [write(tmp_path, found), tmp_path / "own.parquet", tmp_path / "saved"]
    rows_of_both = datasets.Dataset.from_list(found)
    rows_of_both.to_parquet(str(tables[1]))
    rows_of_both.save_to_disk(str(tables[2]))
    tokenizer = byte_tokenizer()
    for source in tables:
        trained = plan(read(table(tiny_llama, source, chat_template=CALLS, max_length=250))).task_data.train
        for number in range(2):
            row = found[number]
            wanted = tokenizer.apply_chat_template(
                row["messages"], tools=row["tools"], chat_template=CALLS, return_dict=False
            )
            ids, _ = trained.row(number)  # type: ignore[attr-defined]
            assert tokenizer.decode(ids) == tokenizer.decode(wanted).rstrip()


def test_null_arguments_of_json_files_stay(tiny_llama: Path, tmp_path: Path) -> None:
    source = write(tmp_path, [calling("f", x=1, y=None)] * 8)
    data = plan(read(table(tiny_llama, source, chat_template=CALLS, max_length=250))).task_data
    text = byte_tokenizer().decode(data.train.row(0)[0])  # type: ignore[attr-defined]
    assert '"arguments": {"x": 1, "y": null}' in text


def test_calls_and_functions_that_the_template_leaves_out_are_not_passed_over(
    tiny_llama: Path, tmp_path: Path
) -> None:
    found = [calling("f", x=1) for _ in range(8)]
    with pytest.raises(ConfigError, match=r"row 1 .*, message 2: .*leaves out a call.*task\.chat_template"):
        plan(read(table(tiny_llama, write(tmp_path, found))))
    for row in found:
        row["messages"] = row["messages"][:1] + row["messages"][3:]
    found[0]["tools"] = []
    note = "7 of 8 training chats have functions (column 'tools'), which the chat template leaves out"
    assert any(note in line for line in plan(read(table(tiny_llama, write(tmp_path, found)))).notes)
    written = plan(read(table(tiny_llama, write(tmp_path, found), chat_template=CALLS)))
    assert not any("leaves out" in line for line in written.notes)


def test_a_call_in_openai_s_older_key_is_no_empty_turn(tiny_llama: Path, tmp_path: Path) -> None:
    found = [calling("f", x=1) for _ in range(8)]
    for row in found:
        turn = row["messages"][1]
        turn["content"], turn["function_call"] = None, turn.pop("tool_calls")[0]["function"]
    source = write(tmp_path, found)
    with pytest.raises(ConfigError, match=r"row 1 .*, message 2: .*leaves out a call.* \(function_call\)"):
        plan(read(table(tiny_llama, source, chat_template=CALLS)))
    older = CALLS.replace("{{ m.content }}", "{{ m.content }}{{ (m.function_call or '') | tojson }}")
    planned = plan(read(table(tiny_llama, source, chat_template=older, max_length=250)))
    text = byte_tokenizer().decode(planned.task_data.train.row(0)[0])  # type: ignore[attr-defined]
    assert '[assistant]{"name": "f", "arguments": {"x": 1}}<end>' in text
    assert not any("empty turn" in note for note in planned.notes)


@pytest.mark.parametrize("chat", [False, True])
def test_instructions_are_recognised(tiny_llama: Path, tmp_path: Path, chat: bool) -> None:
    found = [
        {"instruction": f"say {WORDS[n % 4]}", "input": "now" * (n % 2), "output": "ok", "who": f"{n % 2}"}
        for n in range(12)
    ]
    planned = plan(read(table(tiny_llama, write(tmp_path, found), chat=chat, max_length=250)))
    ids, labels = planned.task_data.train.row(1)  # type: ignore[attr-defined]
    tokenizer = byte_tokenizer()
    learned = tokenizer.decode([label for label in labels if label >= 0])
    text = tokenizer.decode(ids)
    if chat:
        assert text == "[user]say blue\n\nnow<end>\n[assistant]ok<end>"
        assert learned == "ok<end>"
    else:
        assert text.endswith("### Instruction:\nsay blue\n\n### Input:\nnow\n\n### Response: ok<end>")
        assert learned == " ok<end>"
    assert any("rows are instructions with outputs" in note for note in planned.notes)
    assert planned.partition_table()["form"] == "alpaca"


NO_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def trained_texts(settings: Table) -> tuple[list[str], list[str]]:
    """The training rows as text, and the notes."""
    planned, tokenizer = plan(read(settings)), byte_tokenizer()
    train = planned.task_data.train
    rows_of_ids = [train.row(number)[0] for number in range(len(train))]  # type: ignore[attr-defined]
    return [tokenizer.decode(ids) for ids in rows_of_ids], planned.notes


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_column_system_is_the_system_turn_of_chats_that_have_none(
    suffix: str, chosen: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    turns = [{"from": "human", "value": "1?"}, {"from": "gpt", "value": "2"}]
    own = [{"from": "system", "value": "Be kind."}, *turns]
    found = [
        {"conversations": turns, "system": "Be brief.", "who": "a"},
        {"conversations": turns, "system": None, "who": "b"},
        {"conversations": own, "system": "Be kind.", "who": "a"},
        {"conversations": own, "system": "Be brief.", "who": "b"},
    ] * 3
    source = tmp_path / f"own.{suffix}"
    if suffix == "parquet":
        parquet.write_table(pa.Table.from_pylist(found), source)
    else:
        write(tmp_path, found)
    task = {"messages": "conversations", "system": "Be good."} if chosen else {}
    texts, notes = trained_texts(table(tiny_llama, source, **task))
    talk = "[user]1?<end>\n[assistant]2<end>"
    wanted = ["Be brief.", "Be good." if chosen else "", "Be kind.", "Be kind."]
    assert texts[:4] == [f"[system]{system}<end>\n{talk}" if system else talk for system in wanted]
    assert any("column 'system' is the system turn of chats that have none" in note for note in notes)
    assert any("3 of 12 training chats have a system turn that differs from their column" in n for n in notes)
    texts, _ = trained_texts(table(tiny_llama, source, chat_template=NO_SYSTEM, **task))
    assert texts[0] == "[user]Be brief.\n\n1?<end>\n[assistant]2<end>"


@pytest.mark.parametrize("column", ["system", "tools"])
def test_a_column_that_one_file_lacks_is_not_ignored(column: str, tiny_llama: Path, tmp_path: Path) -> None:
    more = {"system": "Be brief.", "tools": [{"name": "look"}]}[column]
    (folder := tmp_path / "train").mkdir()
    for name, found in (("a", rows(8)), ("b", [{**row, column: more} for row in rows(8)])):
        write(folder, found).rename(folder / f"{name}.jsonl")
    with pytest.raises(
        ConfigError, match=rf"train/a.jsonl: .*no column '{column}' \(beside 'messages' in data\.source\)"
    ):
        plan(read(table(tiny_llama, folder)))


def test_a_column_that_begins_late_is_not_ignored(tiny_llama: Path, tmp_path: Path) -> None:
    late = [{**row, "system": "Be brief."} for row in rows(2)]
    texts, _ = trained_texts(table(tiny_llama, write(tmp_path, [*rows(150), *late])))
    assert [text.startswith("[system]Be brief.") for text in texts] == [False] * 150 + [True] * 2


def test_exact_match_leaves_out_chats_that_end_with_a_call(tiny_llama: Path, tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% for c in m.tool_calls or [] %}({{ c.function.name }}){% endfor %}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    own = [
        {**row, "messages": [row["messages"][0], call]} if n % 4 == 0 else row
        for n, row in enumerate(rows(24))
    ]
    settings = table(tiny_llama, write(tmp_path, own), metric="exact-match", chat_template=template)
    (tmp_path / "test").mkdir()
    settings["data"] = {
        "source": str(tmp_path / "own.jsonl"),
        "test": str(write(tmp_path / "test", own[:8])),
    }
    planned = plan(read(settings))
    assert any("2 of 8 test chats end with an answer without text" in note for note in planned.notes)
    found = measurement(planned)
    assert isinstance(found, ExactMatch)
    last = [row["messages"][-1]["content"] for row in own[:8]]
    assert list(found.references) == [text for text in last if text is not None]
    write(tmp_path / "test", own[:1])
    with pytest.raises(ConfigError, match="no chat to evaluate on ends with a text"):
        printed(settings)


def test_test_data_need_the_columns_beside_the_chats(tiny_llama: Path, tmp_path: Path) -> None:
    settings = table(tiny_llama, write(tmp_path, [{**row, "system": "Be brief."} for row in rows(8)]))
    (tmp_path / "test").mkdir()
    test = write(tmp_path / "test", rows(9)[8:])
    settings["data"] = {"source": str(tmp_path / "own.jsonl"), "test": str(test)}
    with pytest.raises(
        ConfigError, match=r"test/own.jsonl: .*no column 'system' \(beside 'messages' in data\.source\)"
    ):
        plan(read(settings))


def instructions() -> list[dict[str, Any]]:
    row = {"instruction": "1+1?", "output": "2", "history": [["Hi", "Hello"]]}
    return [{**row, "system": "Be brief." if n % 2 else "", "who": f"{n // 2 % 2}"} for n in range(12)]


def test_a_column_system_is_the_system_turn_of_instructions(tiny_llama: Path, tmp_path: Path) -> None:
    source, talk = write(tmp_path, instructions()), "[user]1+1?<end>\n[assistant]2<end>"
    texts, notes = trained_texts(table(tiny_llama, source, chat=True))
    assert texts[:2] == [talk, f"[system]Be brief.<end>\n{talk}"]
    assert any("column 'system' is the system turn" in note for note in notes)
    assert any("column 'history' is not read; earlier turns are read from chats" in note for note in notes)
    texts, notes = trained_texts(table(tiny_llama, source, chat=True, chat_template=NO_SYSTEM))
    assert texts[:2] == [talk, talk.replace("1+1?", "Be brief.\n\n1+1?")]
    assert any("column 'system' is the beginning of the user's turn" in note for note in notes)


@pytest.mark.parametrize("task", [{}, {"chat": True, "system": "Be good."}], ids=["text", "system"])
def test_columns_of_instructions_that_are_not_read_are_named(
    task: Table, tiny_llama: Path, tmp_path: Path
) -> None:
    texts, notes = trained_texts(table(tiny_llama, write(tmp_path, instructions()), max_length=250, **task))
    assert not any("brief" in text for text in texts)
    for column in ("system", "history"):
        assert any(f"column '{column}' is not read" in note for note in notes)
    named = table(tiny_llama, tmp_path / "own.jsonl", chat=True, system="{instruction}{system}")
    assert not any("column 'system' is not read" in note for note in trained_texts(named)[1])


def test_columns_prompt_and_answer_are_no_chats(tiny_llama: Path, tmp_path: Path) -> None:
    found = [{"prompt": "x", "answer": "y", "messages": messages(n), "who": f"{n % 2}"} for n in range(12)]
    planned = plan(read(table(tiny_llama, write(tmp_path, found))))
    assert "form" not in planned.partition_table()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            [{"role": "user", "content": "hello"}],
            r"row 2 .*, column 'messages': no message is the assistant's",
        ),
        (
            [{"role": "assistant", "content": "hello"}],
            r"row 2 .*, column 'messages': the assistant answers no turn of a user",
        ),
        ("hello", r"row 2 .*, column 'messages': holds 'hello'"),
    ],
    ids=["no-answer", "no-user", "text"],
)
def test_a_row_that_is_no_chat_is_refused_before_training(
    tiny_llama: Path, tmp_path: Path, change: Any, message: str
) -> None:
    found = rows(12)
    found[1]["messages"] = change
    with pytest.raises(ConfigError, match=message):
        plan(read(table(tiny_llama, write(tmp_path, found))))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"messages": "messages", "prompt": "{a}"}, "messages: chats need no task.prompt"),
        (
            {"messages": "messages", "metric": "multiple-choice", "options_column": "x"},
            "messages: chats have no options",
        ),
    ],
    ids=["prompt", "options"],
)
def test_keys_that_chats_do_not_use_are_refused(task: Table, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(table(Path("model"), Path("own.jsonl"), **task))
