"""Runs on users' own texts from a configuration: learning, saving, resuming, messages and errors."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError, StateError
from fedsmoothlora.runs import session
from fedsmoothlora.runs.check import check
from fedsmoothlora.runs.planning import build, plan
from fedsmoothlora.runs.session import run
from fedsmoothlora.training.loop import to_device

Table = dict[str, Any]
WORDS = ("red", "blue", "green", "grey")


def rows(count: int = 80) -> list[dict[str, str]]:
    """The answer is the question's word: a model of two layers can learn to copy its first letter."""
    return [
        {"question": f"say {WORDS[i % 4]}", "reply": WORDS[i % 4], "who": "north" if i % 3 else "south"}
        for i in range(count)
    ]


def write(folder: Path, found: list[dict[str, Any]], name: str = "own.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def language(model: Path, source: Path) -> Table:
    return {
        "name": "own",
        "model": {"source": str(model)},
        "lora": {"r": 2, "alpha": 4},
        "data": {"source": str(source), "validation": 0.2},
        "task": {"kind": "causal-lm", "prompt": "{question}?", "answer": " {reply}", "max_length": 32},
        "partition": {"kind": "by_column", "column": "who"},
        "method": {"name": "fedsmoothlora", "gamma": 64, "calibration_batches": 1},
        "training": {"rounds": 2, "steps": 6, "lr": 0.02},
        "machine": {"threads": 1, "device": "cpu"},
    }


def documents(model: Path, source: Path) -> Table:
    return {
        "name": "own",
        "model": {"source": str(model)},
        "lora": {"r": 2, "alpha": 4},
        "data": {"source": str(source), "validation": 0.2, "label_column": "reply"},
        "task": {"kind": "text-classification", "prompt": "{question}", "max_length": 32},
        "partition": {"kind": "iid", "clients": 2},
        "method": {"name": "fedsmoothlora", "gamma": 64, "calibration_batches": 1},
        "training": {"rounds": 2, "steps": 6, "optimizer": "adamw", "lr": 0.02},
        "machine": {"threads": 1, "device": "cpu"},
    }


def quiet(table: Table, out: Path, **more: Any) -> session.Result:
    return run(table, out=out, console=Console(file=io.StringIO()), **more)


@pytest.mark.parametrize("which", ["tiny_llama", "tiny_gpt2"])
def test_a_language_model_learns_from_a_jsonl_file_and_is_saved_whole(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    table = language(request.getfixturevalue(which), write(tmp_path, rows()))
    result = quiet(table, tmp_path / "run")
    losses = result.values("loss")
    assert losses[-1] < 0.7 * losses[0]
    config = read(tmp_path / "run" / "config.toml")
    # Every linear layer but the head: GPT-2's are stored transposed.
    planned = plan(config)
    kinds = {name.rsplit(".", 1)[-1] for name in planned.layers}
    own = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert kinds == (own if which == "tiny_llama" else {"c_attn", "c_proj", "c_fc"})
    # The saved model is the one that was measured last.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    simulation = build(planned)
    assert simulation.validation
    total, tokens = 0.0, 0.0
    for part in simulation.validation.values():
        one = simulation.learner.objective.evaluate(model, part, 16, lambda batch: batch)
        assert one.weight is not None
        total, tokens = total + one.metrics["loss"] * one.weight, tokens + one.weight
    assert total / tokens == pytest.approx(losses[-1], rel=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").eos_token == "<end>"


@pytest.mark.parametrize("kind", ["causal-lm", "preference", "text-classification"])
def test_a_coordinator_without_training_rows_is_checked(
    kind: str, tiny_llama: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    classifies = kind == "text-classification"
    table = documents(tiny_bert, tmp_path) if classifies else language(tiny_llama, tmp_path)
    test = write(tmp_path, [{**row, "label": row["reply"]} for row in rows(8)])
    table["data"] = {"source": str(tmp_path / "at-sites"), "test": str(test)}
    if classifies:
        table["data"] |= {"label_column": "reply", "classes": list(WORDS)}
    if kind == "preference":
        table["task"] = {"kind": kind, "prompt": "{question}", "chosen": "{reply}", "rejected": "{who}"}
        table["task"]["max_length"] = 32
    table |= {"flower": {"clients": ["north", "south"]}, "partition": {"kind": "by_file"}}
    console = Console(file=io.StringIO(), width=200)
    check(read(table), console)
    assert isinstance(console.file, io.StringIO)
    assert "training rows: none here" in console.file.getvalue() or kind == "preference"
    assert "everything that can be checked" in console.file.getvalue()


def test_a_sequence_classifier_learns_and_is_saved_whole(tiny_bert: Path, tmp_path: Path) -> None:
    result = quiet(documents(tiny_bert, write(tmp_path, rows())), tmp_path / "run")
    assert result.values("accuracy")[-1] > 0.9 > result.values("accuracy")[0]
    assert result.values("macro_f1")[-1] > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert tuple(model.config.id2label.values()) == tuple(sorted(WORDS))


def test_a_run_with_parts_dropout_and_bfloat16_resumes_bit_for_bit(tiny_gpt2: Path, tmp_path: Path) -> None:
    table = language(tiny_gpt2, write(tmp_path, rows(24)))
    table["lora"]["dropout"] = 0.1
    table["training"] |= {"rounds": 2, "steps": 2, "accumulation": 3, "precision": "bf16"}
    table["training"]["gradient_checkpointing"] = True
    whole = quiet(table, tmp_path / "whole")
    calls = 0

    def stop_in_round_2(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise KeyboardInterrupt
        return visit(*arguments, **more)

    from fedsmoothlora.federation.client import Learner

    visit = Learner.visit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "visit", stop_in_round_2)
        with pytest.raises(KeyboardInterrupt):
            quiet(table, tmp_path / "cut")
    resumed = run(resume=tmp_path / "cut", console=Console(file=io.StringIO()))
    timeless = [
        [line for line in result.metrics if not line["name"].startswith("seconds_")]
        for result in (whole, resumed)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"training.accumulation": 4},
        {"training.tokens_per_batch": 60},
        {"training.gradient_checkpointing": True},
    ],
    ids=["parts", "tokens", "checkpointing"],
)
@pytest.mark.parametrize("which", ["tiny_llama", "tiny_gpt2"])
def test_parts_and_checkpointing_change_nothing_but_rounding(
    which: str, changes: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """One client's round, including its calibration gradient, from the same start."""
    table = language(request.getfixturevalue(which), write(tmp_path, rows(24)))
    table["training"] |= {"rounds": 1, "steps": 2, "optimizer": "sgd", "lr": 0.01}
    losses = []
    for overrides in ({}, changes):
        result = quiet(read(table, overrides), tmp_path / f"run{len(losses)}")
        names = ("loss", "train_loss_last")
        losses.append([line["value"] for line in result.metrics if line["name"] in names])
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)


@pytest.mark.parametrize(
    "changes",
    [{}, {"training.accumulation": 3}, {"training.tokens_per_batch": 60}, {"training.precision": "bf16"}],
)
@pytest.mark.parametrize("which", ["tiny_llama", "tiny_gpt2"])
def test_the_calibration_gradient_is_autograd_s(
    which: str, changes: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from fedsmoothlora.training.calibration import calibration_gradients

    table = language(request.getfixturevalue(which), write(tmp_path, rows(24)))
    learner = (simulation := build(plan(read(table, changes)))).learner
    batch = to_device(simulation.clients["north"].batch(range(8)), learner.accelerator)
    modules, model = learner.model.modules, learner.model
    with model.without_lora():
        got = calibration_gradients(model.model, modules, [batch], learner.loss, learner.loss.split)
        for module in modules.values():
            module.weight.requires_grad_(True)
        # In float32 whatever the precision: what bfloat16 is measured against.
        learner.objective.loss(model.model.eval(), batch).backward()
    close = 0.05 if changes.get("training.precision") else 1e-4
    for name, module in modules.items():
        wanted = module.weight.grad
        wanted = wanted if isinstance(module, torch.nn.Linear) else wanted.mT
        assert got[name].dtype == torch.float32
        assert float((got[name] - wanted).norm()) <= close * float(wanted.norm()), name


def test_bfloat16_leaves_weights_factors_and_uploads_float32(tiny_llama: Path, tmp_path: Path) -> None:
    from fedsmoothlora.callbacks import Callback
    from fedsmoothlora.federation.client_state import ClientState

    table = language(tiny_llama, write(tmp_path, rows(24)))
    simulation = build(plan(read(table, {"training.precision": "bf16", "training.steps": 1})))
    seen: set[torch.dtype] = set()
    model = simulation.learner.model
    simulation.learner.model.model.lm_head.register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    reply = simulation.learner.visit(
        "north", simulation.clients["north"], simulation.server.message("north"), ClientState(), Callback()
    ).reply
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.model.parameters()} == {torch.float32}
    for product in reply.sent.values():
        assert (product.B.dtype, product.A.dtype) == (torch.float32, torch.float32)


def said(table: Table, **more: Any) -> str:
    out = io.StringIO()
    check(read(table), Console(file=out, width=200), **more)
    return out.getvalue()


@pytest.mark.parametrize("which", ["tiny_llama", "tiny_gpt2"])
def test_check_reports_lengths_cut_rows_layers_and_memory(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    found = [*rows(20), {"question": "say " + "very " * 9 + "red", "reply": "red", "who": "north"}]
    table = language(request.getfixturevalue(which), write(tmp_path, found))
    text = said(table)
    longest = max(len(f"{row['question']}? {row['reply']}") + 1 for row in rows(20))
    assert "training rows longer than task.max_length = 32 tokens: 1 of 21 lose the beginning" in text
    shortest = min(len(f"{row['question']}? {row['reply']}") + 1 for row in rows(20))
    assert longest < 32
    assert f"training rows: {shortest} to 32 tokens" in text
    assert "activations of a training batch" in text
    assert "in order" in text


def test_check_notes_texts_that_are_cut(tiny_bert: Path, tmp_path: Path) -> None:
    found = [*rows(20), {"question": "say " + "very " * 9 + "red", "reply": "red", "who": "north"}]
    text = said(documents(tiny_bert, write(tmp_path, found)))
    assert "1 of 21 training texts are longer than task.max_length = 32 tokens" in text
    assert "21 training rows, no test set, 4 classes" in text


def test_costly_metrics_are_computed_at_the_ends_or_at_the_set_interval(
    tiny_llama: Path, tmp_path: Path
) -> None:
    found = [{**row, "choices": list(WORDS)} for row in rows(24)]
    table = language(tiny_llama, write(tmp_path, found))
    table["training"] |= {"rounds": 3, "steps": 1}
    table["task"] |= {"metric": "multiple-choice", "options_column": "choices", "metric_rows": 4}
    taken = [
        line["round"]
        for line in quiet(table, tmp_path / "ends").metrics
        if line["name"] == "accuracy" and line["client"] is None
    ]
    assert taken == [0, 3]
    table["task"] = {k: v for k, v in table["task"].items() if k != "options_column"}
    table["task"] |= {"metric": "exact-match", "metric_every": 1, "max_new_tokens": 4}
    result = quiet(table, tmp_path / "all")
    assert len(result.values("exact_match")) == 4


# -- bad data ----------------------------------------------------------------------------------------


def one_wrong(key: str, value: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        found: list[dict[str, Any]] = list(rows(8))
        found[4] = {**found[4], key: value}
        return write(folder, found)

    return make


def latin(folder: Path) -> Path:
    path = write(folder, rows(4))
    path.write_bytes(path.read_bytes() + '{"question": "café"}\n'.encode("latin-1"))
    return path


def csv(folder: Path) -> Path:
    path = folder / "own.csv"
    path.write_text("question,reply,who\nsay red,red,north\nsay blue,,north\n", encoding="utf-8")
    return path


def columnar(folder: Path) -> Path:
    path = folder / "own.parquet"
    parquet.write_table(pa.table({"question": ["a", "b"], "reply": ["c", " "], "who": ["x", "x"]}), path)
    return path


@pytest.mark.parametrize(
    ("make", "changes", "wanted"),
    [
        (one_wrong("reply", " "), {}, ["own.jsonl: row 5", "column 'reply'", "the text is empty"]),
        (one_wrong("question", None), {}, ["own.jsonl: row 5", "column 'question'", "the text is empty"]),
        (csv, {}, ["own.csv: row 2", "column 'reply'", "the text is empty"]),
        (columnar, {}, ["own.parquet: row 2", "column 'reply'", "the text is empty"]),
        (latin, {}, ["own.jsonl: line 5 is not UTF-8"]),
        (one_wrong("who", ""), {}, ["own.jsonl: row 5", "column 'who'", "the client is missing"]),
        (
            one_wrong("reply", "red"),
            {"task.prompt": "{qestion}"},
            ["no column 'qestion' (task.prompt)", "did you mean 'question'?"],
        ),
        (one_wrong("reply", "red"), {"task.prompt": "{question"}, ["task.prompt = '{question'"]),
        (
            one_wrong("reply", "red"),
            {"task.chat": True, "task.system": "{nosuch}"},
            ["no column 'nosuch' (task.system)"],
        ),
        (
            one_wrong("reply", "red"),
            {"task.chat": True, "task.system": "{}"},
            ["task.system = '{}'", "the name of a column and nothing else"],
        ),
        (
            one_wrong("reply", "red"),
            {"task.answer": "{reply.text}"},
            ["no column 'reply.text' (task.answer)"],
        ),
        (one_wrong("reply", "red"), {"task.answer": "yes"}, ["task.answer = 'yes' names no column"]),
        (
            one_wrong("reply", "red"),
            {"task.max_length": 300},
            ["task.max_length = 300", "256 tokens at most"],
        ),
        (
            one_wrong("reply", "red"),
            {"task.metric": "multiple-choice", "task.options_column": "question"},
            ["own.jsonl: row 1", "column 'question': 1 options"],
        ),
        (
            one_wrong("choices", "a\nb"),
            {"task.metric": "multiple-choice", "task.options_column": "choices"},
            ["own.jsonl: row 1", "column 'choices': 0 options"],
        ),
        (
            one_wrong("reply", "red"),
            {"partition.kind": "dirichlet", "partition.clients": 2, "partition.alpha": 1.0},
            ["partition.kind = 'dirichlet' deals rows by their label: set data.label_column"],
        ),
        (
            one_wrong("reply", "red"),
            {"data.where_column": "who", "data.where_values": ["west"]},
            ["own.jsonl", "no row has a 'who'", "north, south"],
        ),
    ],
)
def test_bad_data_is_refused_with_file_row_and_column(
    tiny_llama: Path, tmp_path: Path, make: Callable[[Path], Path], changes: dict[str, Any], wanted: list[str]
) -> None:
    table = language(tiny_llama, make(tmp_path))
    with pytest.raises(ConfigError) as refused:
        plan(read(table, changes))
    for part in wanted:
        assert part in str(refused.value)


def test_a_system_message_is_a_template_over_the_row(tiny_llama: Path, tmp_path: Path) -> None:
    table = language(tiny_llama, write(tmp_path, rows(24)))
    table["task"] |= {"chat": True, "system": "{{{who}}}", "max_length": 128}
    train = plan(read(table)).task_data.train
    written = [AutoTokenizer.from_pretrained(tiny_llama).decode(ids) for ids in train.prompts]
    assert written[0] == "[system]{south}<end>\n[user]say red?<end>\n[assistant]"
    assert written[1] == "[system]{north}<end>\n[user]say blue?<end>\n[assistant]"


def test_a_classifier_s_prompt_without_a_column_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    table = documents(tiny_bert, write(tmp_path, rows(8)))
    with pytest.raises(ConfigError, match=r"task\.prompt = '\{\{question\}\}' names no column"):
        plan(read(table, {"task.prompt": "{{question}}"}))


def test_a_label_outside_the_training_set_is_refused_with_its_place(tiny_bert: Path, tmp_path: Path) -> None:
    table = documents(tiny_bert, write(tmp_path, rows(8)))
    test = [*rows(4), {"question": "say pink", "reply": "pink", "who": "north"}]
    table["data"]["test"] = str(write(tmp_path, test, "test.jsonl"))
    with pytest.raises(ConfigError, match=r"test.jsonl: row 5 .*column 'reply': the class 'pink' is not"):
        plan(read(table))


def test_rows_are_kept_by_the_value_of_a_column(tiny_llama: Path, tmp_path: Path) -> None:
    table = language(tiny_llama, write(tmp_path, rows(12)))
    table["data"] |= {"where_column": "who", "where_values": ["south"]}
    planned = plan(read(table))
    assert list(planned.partition.clients) == ["south"]
    assert len(planned.train) == 4


@pytest.mark.parametrize(
    ("task", "wanted"),
    [
        (
            {"prompt": "{x}"},
            "task.prompt = '{x}' belongs to task.kind = 'causal-lm' or 'multi-label' or ",
        ),
        (
            {"kind": "text-classification", "answer": "{x}"},
            "task.answer = '{x}' belongs to task.kind = 'causal-lm'",
        ),
        ({"kind": "causal-lm", "marker": "####"}, "task.marker belongs to task.metric = 'exact-match'"),
        ({"kind": "causal-lm", "metric": "multiple-choice"}, "task.options_column is missing"),
        ({"kind": "causal-lm", "system": "Be brief."}, "task.system belongs to task.chat = true"),
        ({"kind": "causal-lm", "metric": "bleu"}, "task.metric = 'bleu'"),
    ],
)
def test_keys_of_another_task_or_metric_are_refused(
    tiny_llama: Path, tmp_path: Path, task: Table, wanted: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(wanted)):
        read({**language(tiny_llama, tmp_path), "task": task})


def test_a_language_model_s_head_is_not_trained_whole(tiny_llama: Path, tmp_path: Path) -> None:
    table = language(tiny_llama, write(tmp_path, rows(8)))
    with pytest.raises(ConfigError, match=r"model\.head = 'full': a language model's head is not trained"):
        plan(read(table, {"model.head": "full"}))


def test_sites_of_one_class_have_no_matthews_correlation(tiny_bert: Path, tmp_path: Path) -> None:
    """It would be 0 for every model; the run has the correlation of the sites that have both classes."""
    words = {"north": ("red", "blue"), "south": ("red", "red")}
    found = [
        {"question": word, "reply": word, "who": who} for who, both in words.items() for word in both * 20
    ]
    table = documents(tiny_bert, write(tmp_path, found))
    table["partition"] = {"kind": "by_column", "column": "who"}
    table["method"] = {"name": "fedit"}
    table["training"] |= {"rounds": 3, "lr": 0.005}
    result = quiet(table, tmp_path / "run")
    of_sites = {(line["client"], line["name"]): line["value"] for line in result.metrics}
    assert ("south", "accuracy") in of_sites
    assert ("south", "mcc") not in of_sites
    assert result.values("mcc")[-1] == of_sites["north", "mcc"] > 0.5


@pytest.mark.parametrize("before", [["blue", "red"], ["red", "blue", "green"]], ids=["order", "number"])
def test_a_run_whose_outputs_had_other_names_is_not_resumed(
    before: list[str], tiny_bert: Path, tmp_path: Path
) -> None:
    """Data, weights and configuration are the same: another version has read other names."""
    found = [{"question": word, "reply": word} for word in ("red", "blue") * 20]
    table = documents(tiny_bert, write(tmp_path, found))
    table["data"]["classes"] = ["red", "blue"]
    quiet(table, tmp_path / "run")
    path = tmp_path / "run" / "partition.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "classes": before}))
    with pytest.raises(
        StateError, match=r"output \d of the run's model is '(blue|green)', and the same data"
    ):
        run(resume=tmp_path / "run", console=Console(file=io.StringIO()))
