"""Numbers, labels, tags and answers: runs learn, are saved, exported and loaded by other libraries."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from peft import PeftModel
from rich.console import Console

from fedsmoothlora import export, load_adapter
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.logs import quiet_libraries
from fedsmoothlora.runs.check import check
from fedsmoothlora.runs.planning import build, plan
from fedsmoothlora.runs.session import Result, run
from fedsmoothlora.tasks import find
from task_runs import KINDS, TASKS, model_for, rows_of, table_of, write_rows
from word_models import WORDS, word_encoder

CLASSES = {"seq2seq": "AutoModelForSeq2SeqLM", "token-classification": "AutoModelForTokenClassification"}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: model_for(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def finished(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Result, Path]]:
    """The result of a run of each task, and the pretrained model; each is run once."""
    found: dict[str, Result] = {}

    def of(kind: str) -> tuple[Result, Path]:
        if kind not in found:
            folder = tmp_path_factory.mktemp(f"{kind}-run")
            table = table_of(kind, models[kind], write_rows(folder, rows_of(kind)))
            if kind == "seq2seq":  # with fewer steps, some draws of its weights learn too little
                table["training"]["steps"] = 24
            found[kind] = run(table, out=folder / "run", console=quiet())
        return found[kind], models[kind]

    return of


Finished = Callable[[str], tuple[Result, Path]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_measures_every_client(finished: Finished, kind: str) -> None:
    result, _ = finished(kind)
    losses = result.values("loss")
    assert losses[-1] < 0.8 * losses[0]
    main = find(kind)().metrics[0]
    values = result.values(main)
    assert values[-1] > 0.45
    clients = {line["client"] for line in result.metrics if line["name"] == "loss" and line["client"]}
    assert clients == {"0", "1"}
    names = {line["name"] for line in result.metrics if line["client"] is None}
    wanted = set(find(kind)().metrics)
    assert wanted <= names


def inputs_of(folder: Path, kind: str) -> dict[str, Any]:
    """Two texts of different lengths, by the exported tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = dict(tokenizer(["red and blue", "green"], padding=True, return_tensors="pt"))
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = torch.tensor([[0, 4], [0, 5]])
    return inputs


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_and_peft_load_the_exports_with_equal_outputs(
    finished: Finished, kind: str, tmp_path: Path
) -> None:
    result, source = finished(kind)
    for as_ in ("merged", "adapter"):
        export(result.folder, as_, out=tmp_path / as_, console=quiet())
    facts = json.loads((tmp_path / "adapter" / "fedsmoothlora.json").read_text())
    auto = getattr(transformers, CLASSES.get(kind, "AutoModelForSequenceClassification"))
    problem = find(kind).problem_type
    names = {"num_labels": len(facts["classes"])} if facts["classes"] else {}
    with quiet_libraries(), torch.no_grad():
        merged = auto.from_pretrained(tmp_path / "merged").eval()
        base = auto.from_pretrained(source, **names, **({"problem_type": problem} if problem else {}))
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        inputs = inputs_of(tmp_path / "merged", kind)
        wanted = merged(**inputs).logits
        for model in (adapted, load_adapter(tmp_path / "adapter")):
            torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(auto.from_pretrained(source, **names)(**inputs).logits, wanted, atol=0.05)
    assert getattr(merged.config, "problem_type", None) == problem
    assert facts["kind"] == kind
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert auto.__name__ in card
    if kind in ("text-regression", "multi-label"):
        assert f'problem_type="{problem}"' in card
    if kind != "seq2seq":
        assert tuple(merged.config.id2label.values()) == tuple(facts["classes"])
        assert f"num_labels={len(facts['classes'])}" in card


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_model_is_the_one_that_was_measured_last(finished: Finished, kind: str) -> None:
    result, _ = finished(kind)
    auto = getattr(transformers, CLASSES.get(kind, "AutoModelForSequenceClassification"))
    with quiet_libraries():
        model = auto.from_pretrained(result.folder / "model", dtype=torch.float32)
    simulation = build(plan(read(result.folder / "config.toml")))
    total, weights = 0.0, 0.0
    for part in simulation.validation.values():
        one = simulation.learner.objective.evaluate(model, part, 4, lambda batch: batch)
        weight = one.weight or len(part)
        total, weights = total + one.metrics["loss"] * weight, weights + weight
    assert total / weights == pytest.approx(result.values("loss")[-1], rel=1e-4)


def said(table: dict[str, Any]) -> str:
    out = io.StringIO()
    check(read(table), Console(file=out, width=200))
    return out.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_check_reports_the_task_and_its_memory(models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    text = said(table_of(kind, models[kind], write_rows(tmp_path, rows_of(kind))))
    assert "everything that can be checked before training is in order" in text
    assert "activations of a training batch" in text
    facts = {
        "token-classification": "3 tags: B-COLOUR, I-COLOUR, O",
        "multi-label": "4 labels and their rows: blue (28), green (28), grey (28), red (28)",
        "text-regression": "numbers: -1.5 to 2.25, mean 0.375",
        "seq2seq": "training answers: 3 to 3 tokens",
    }
    assert facts[kind] in text


@pytest.mark.parametrize("kind", ["multi-label", "token-classification"])
def test_class_weights_change_the_training_and_not_the_metrics_before_it(
    finished: Finished, kind: str, tmp_path: Path
) -> None:
    result, _ = finished(kind)
    table = {"training.class_weights": "balanced", "training.rounds": 1, "training.steps": 2}
    weighted = run(read(result.folder / "config.toml", table), out=tmp_path / "run", console=quiet())
    assert weighted.values("loss")[0] == result.values("loss")[0]
    losses = [
        next(line["value"] for line in one.metrics if line["name"] == "train_loss_first")
        for one in (result, weighted)
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(("kind", "wanted"), [("text-regression", "no classes"), ("seq2seq", "no classes")])
def test_class_weights_are_refused_without_classes(
    models: dict[str, Path], kind: str, wanted: str, tmp_path: Path
) -> None:
    table = table_of(kind, models[kind], write_rows(tmp_path, rows_of(kind)))
    table["training"]["class_weights"] = "balanced"
    with pytest.raises(ConfigError, match=wanted):
        read(table)


def test_a_table_of_class_weights_names_the_tags(models: dict[str, Path], tmp_path: Path) -> None:
    kind = "token-classification"
    table = table_of(kind, models[kind], write_rows(tmp_path, rows_of(kind)))
    table["training"]["class_weights"] = {"O": 1.0, "B-COLOUR": 2.0}
    with pytest.raises(ConfigError, match="no weight for the class 'I-COLOUR'"):
        plan(read(table))


@pytest.mark.parametrize("kind", KINDS)
def test_early_stopping_follows_the_tasks_main_metric(
    models: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    """With such a learning rate no weight changes, so no round is better than the first."""
    table = table_of(kind, models[kind], write_rows(tmp_path, rows_of(kind, 16)), method={"name": "fedit"})
    table["training"] = {"rounds": 4, "steps": 1, "patience": 1, "lr": 1e-30}
    table["task"] = {key: value for key, value in TASKS[kind].items() if key not in ("scores", "metric_rows")}
    stopped = run(table, out=tmp_path / "run", console=quiet())
    assert stopped.rounds == 1
    best = read(table).checkpoint.best
    assert f"{best} has not improved" in (tmp_path / "run" / "stopped.json").read_text()


@pytest.mark.parametrize("best", ["auroc", "accuracy"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_best_metric_that_the_task_does_not_measure_is_refused(
    models: dict[str, Path], kind: str, best: str, tmp_path: Path
) -> None:
    table = table_of(kind, models[kind], write_rows(tmp_path, rows_of(kind)), checkpoint={"best": best})
    with pytest.raises(ConfigError, match=rf"checkpoint.best = '{best}' is not measured by task.kind"):
        read(table)


def test_a_best_metric_that_the_rows_do_not_have_is_reported(models: dict[str, Path], tmp_path: Path) -> None:
    kind = "token-classification"
    rows = [{"tokens": ["red", "blue"], "tags": ["NOUN", "VERB"], "client": "ab"[n % 2]} for n in range(16)]
    table = table_of(kind, models[kind], write_rows(tmp_path, rows))
    console = Console(file=io.StringIO(), width=200)
    run(read(table, {"training.rounds": 1}), out=tmp_path / "run", console=console)
    assert isinstance(console.file, io.StringIO)
    assert "checkpoint.best = 'entity_f1': the run records no such metric" in console.file.getvalue()


POS = [{"tokens": ["red", "blue"], "tags": ["NOUN", "VERB"]}] * 16


def lacking_cases(folder: Path) -> dict[str, dict[str, Any]]:
    """Tables of data that have all metrics of their task, and of data that do not."""
    bert = word_encoder("bert", folder / "bert")
    texts = [
        {"text": f"{word} sea", "label": ["warm", "cold", "none"][n % 3]} for n, word in enumerate(WORDS * 3)
    ]
    labels = [{"text": row["text"], "label": [row["label"]]} for row in texts]
    found = {}
    for name, test in (
        ("all classes", texts),
        ("two classes", [row for row in texts if row["label"] != "none"]),
        ("one class", [row for row in texts if row["label"] == "none"]),
    ):
        table = table_of("multi-label", bert, write_rows(folder, texts, f"{name}.jsonl"))
        table["task"] = {"kind": "text-classification", "max_length": 16}
        own = [{**row, "text": f"the {row['text']}"} for row in test]
        table["data"]["test"] = str(write_rows(folder, own, f"{name} test.jsonl"))
        found[name] = table
    for name, test in (("labels", labels), ("no labels", [{**row, "label": []} for row in labels])):
        table = table_of("multi-label", bert, write_rows(folder, labels, f"{name}.jsonl"))
        own = [{**row, "text": f"the {row['text']}"} for row in test]
        table["data"]["test"] = str(write_rows(folder, own, f"{name} test.jsonl"))
        found[name] = table
    numbers = [{"text": row["text"], "label": n % 3} for n, row in enumerate(texts)]
    for name, test in (("numbers", numbers), ("one number", [{**row, "label": 2} for row in numbers])):
        table = table_of("multi-label", bert, write_rows(folder, numbers, f"{name}.jsonl"))
        table["task"] = {"kind": "text-regression", "prompt": "{text}", "max_length": 16}
        own = [{**row, "text": f"the {row['text']}"} for row in test]
        table["data"]["test"] = str(write_rows(folder, own, f"{name} test.jsonl"))
        found[name] = table
    found["entities"] = table_of(
        "token-classification",
        bert,
        write_rows(folder, rows_of("token-classification", 16), "entities.jsonl"),
    )
    found["parts of speech"] = table_of("token-classification", bert, write_rows(folder, POS, "pos.jsonl"))
    return found


def test_a_metric_that_the_rows_do_not_have_is_refused_before_training(tmp_path: Path) -> None:
    """The metrics that a round records are the oracle."""
    lacking = {}
    for name, table in lacking_cases(tmp_path).items():
        table["training"] = {"rounds": 1, "steps": 1}
        record = next(iter(run_rounds(build(plan(read(table))), Callback())))
        lacking[name] = set()
        for best in read(table).task.metrics:
            chosen = {"checkpoint.best": best, "training.patience": 1}
            if record.value(best) is not None:
                plan(read(table, chosen)).check_metric(best, "--metric")
                continue
            lacking[name].add(best)
            with pytest.raises(
                ConfigError, match=rf"checkpoint.best = '{best}', which training.patience = 1"
            ):
                plan(read(table, chosen))
            with pytest.raises(
                ConfigError, match=f"--metric {best}: is not measured by .* choose one of .*loss"
            ):
                plan(read(table)).check_metric(best, "--metric")
            if best != read(table).checkpoint.best:  # the default, which the note reports
                with pytest.raises(ConfigError, match=rf"checkpoint.best = '{best}': these data do not have"):
                    plan(read(table, {"checkpoint.best": best}))
    assert lacking == {
        "all classes": set(),
        "two classes": {"auroc"},
        "one class": {"auroc", "mcc"},
        "labels": set(),
        "no labels": {"micro_f1", "macro_f1", "mean_average_precision"},
        "numbers": set(),
        "one number": {"pearson", "spearman"},
        "entities": set(),
        "parts of speech": {"entity_f1", "entity_precision", "entity_recall"},
    }


def test_without_a_test_set_one_client_that_has_the_metric_is_enough(tmp_path: Path) -> None:
    table = lacking_cases(tmp_path)["all classes"]
    del table["data"]["test"]
    table["checkpoint"] = {"best": "auroc"}
    table["data"]["validation"] = 0.5
    plan(read(table))
    table["partition"] = {"kind": "by_column", "column": "label"}
    with pytest.raises(ConfigError, match=r"checkpoint\.best = 'auroc': these data do not have this metric"):
        plan(read(table))


def test_a_score_that_is_not_configured_or_too_rare_is_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    table = table_of("seq2seq", models["seq2seq"], write_rows(tmp_path, rows_of("seq2seq")))
    best = {"checkpoint.best": "rougeL"}
    read(table, best)
    with pytest.raises(
        ConfigError, match=r"'rougeL' is not measured .* measures bleu, loss, perplexity and the"
    ):
        read(table, {**best, "task.scores": ["bleu"]})
    for every, patience, fits in ((None, 2, False), (0, 2, False), (3, 2, False), (2, 2, True), (1, 2, True)):
        chosen = {**best, "training.patience": patience}
        chosen |= {} if every is None else {"task.metric_every": every}
        if fits:
            read(table, chosen)
            continue
        with pytest.raises(ConfigError, match=r"set task\.metric_every to at most 2"):
            read(table, chosen)


# -- bad data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained", "tested", "is_hidden"),
    [
        ([0.0, 2.5, 5.0], [-1.0, -1.0], True),  # as GLUE publishes STS-B
        ([0.0, 2.5, -1.0], [-1.0, -1.0], False),
        ([0.0, 2.5, 5.0], [-1.0, -2.0], False),
        ([0.0, 2.5, 5.0], [7.0], False),
        ([0.0, 2.5, 5.0], [0, 0, 0], False),
    ],
)
def test_a_test_split_that_hides_its_numbers_is_refused(
    models: dict[str, Path], tmp_path: Path, trained: list[float], tested: list[float], is_hidden: bool
) -> None:
    rows = [{"text": f"red {n} {m}", "score": score} for n, score in enumerate(trained) for m in range(8)]
    table = table_of("text-regression", models["text-regression"], write_rows(tmp_path, rows))
    own = [{"text": f"a test {n}", "score": score} for n, score in enumerate(tested)]
    table["data"] |= {"test": str(write_rows(tmp_path, own, "test.jsonl"))}
    if is_hidden:
        with pytest.raises(
            ConfigError, match=f"all {len(tested)} test rows have the number -1, .*hide.*test_split"
        ):
            plan(read(table))
    else:
        plan(read(table))


REFUSED: list[Any] = [
    pytest.param(
        "text-regression", {"score": "many"}, {}, "row 5.*'many' is no finite number", id="no number"
    ),
    *(
        pytest.param(
            "text-regression",
            {"score": score},
            {},
            f"row 5.*'{score}' is no finite number in float32; write one with digits",
            id=f"not plain {number}",
        )
        for number, score in enumerate(("1_000", "٣", "\uff11", "1,5", "0x10", "nan", "1e999"))
    ),
    pytest.param("text-regression", {"score": None}, {}, "row 5.*the number is missing", id="missing"),
    pytest.param("text-regression", {"score": "inf"}, {}, "row 5.*'inf' is no finite number", id="infinite"),
    pytest.param(
        "text-regression", {"score": 1e39}, {}, "row 5.*no finite number in float32", id="too large"
    ),
    pytest.param("text-regression", {"score": "9" * 400}, {}, r"row 5.*9\.\.\.' is no", id="long"),
    pytest.param(
        "text-regression", {}, {"data.classes": ["a", "b"]}, "data.classes belongs to", id="classes"
    ),
    pytest.param("multi-label", {"label": "red"}, {}, "row 5.*holds a text, should be a list", id="no list"),
    pytest.param(
        "multi-label",
        {"label": ["pink"]},
        {"data.classes": ["red", "blue", "green", "grey"]},
        "row 5.*there is no label 'pink'",
        id="unknown label",
    ),
    pytest.param("multi-label", {"label": [" "]}, {}, "row 5.*there is no label ' '", id="blank label"),
    pytest.param(
        "multi-label", {"score": 2}, {"task.label_columns": ["score", "b"]}, "no column 'b'", id="no column"
    ),
    pytest.param("multi-label", {}, {"task.label_columns": ["a", "a"]}, "two or more different", id="twice"),
    pytest.param(
        "token-classification", {"tags": ["O"]}, {}, "row 5.*4 words .* and 1 tags", id="other length"
    ),
    *(
        pytest.param(
            "token-classification",
            {"tags": ["O", "O", tag, "O"]},
            classes,
            f"row 5.*column 'tags'.*{what}",
            id=f"tag {tag!r} {len(classes)}",
        )
        for classes in ({}, {"data.classes": ["O", "B-COLOUR", "I-COLOUR"]})
        for tag, what in (
            ("", "the tag of word 3, 'and', is missing"),
            (" ", "the tag of word 3, 'and', is missing"),
            (None, "the list holds nothing"),
            (float("nan"), "the list holds nothing"),
        )
    ),
    pytest.param(
        "token-classification", {"tokens": [], "tags": []}, {}, "row 5.*there are no words", id="no words"
    ),
    pytest.param(
        "token-classification", {}, {"data.classes": ["O", "B-COLOUR"]}, "no tag 'I-COLOUR'", id="unknown tag"
    ),
    pytest.param(
        "token-classification", {}, {"task.tags_column": "tokens"}, "are both 'tokens'", id="same column"
    ),
    pytest.param("seq2seq", {"answer": " "}, {}, "row 5.*the text is empty", id="empty answer"),
    pytest.param("seq2seq", {}, {"task.answer": "yes"}, "names no column", id="no answer"),
    pytest.param("seq2seq", {}, {"model.head": "full"}, "model.head = 'full'", id="whole head"),
    pytest.param("seq2seq", {}, {"task.scores": []}, "metric_rows belongs to task.scores", id="no scores"),
    *(
        pytest.param(
            kind,
            {},
            {"partition.kind": "dirichlet", "partition.alpha": 1.0},
            "deals rows by their label",
            id=f"dirichlet {kind}",
        )
        for kind in KINDS
    ),
]


@pytest.mark.parametrize(("kind", "value", "changes", "wanted"), REFUSED)
def test_wrong_data_and_keys_are_refused(
    models: dict[str, Path],
    kind: str,
    value: dict[str, Any],
    changes: dict[str, Any],
    wanted: str,
    tmp_path: Path,
) -> None:
    found = rows_of(kind, 8)
    found[4] |= value
    table = table_of(kind, models[kind], write_rows(tmp_path, found))
    with pytest.raises(ConfigError, match=wanted):
        plan(read(table, changes))


@pytest.mark.parametrize(
    ("kind", "package"), [("token-classification", "seqeval"), ("seq2seq", "rouge_score")]
)
def test_a_missing_package_of_metrics_is_named_with_the_extra(
    models: dict[str, Path], kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsmoothlora.tasks import base

    monkeypatch.setattr(base, "find_spec", lambda name: None if name == package else object())
    table = table_of(kind, models[kind], write_rows(tmp_path, rows_of(kind)))
    with pytest.raises(ConfigError, match=rf"{package}.*pip install 'fedsmoothlora\[tasks\]'"):
        plan(read(table))


def test_lists_of_zeros_and_ones_are_no_names_of_labels(models: dict[str, Path], tmp_path: Path) -> None:
    for flags in ([0, 1, 0], [False, True, True]):
        rows = [{"text": f"red {n}", "label": flags} for n in range(8)]
        table = table_of("multi-label", models["multi-label"], write_rows(tmp_path, rows))
        with pytest.raises(ConfigError, match="every list holds 3 zeros and ones; should hold the names"):
            plan(read(table))
    one_each = [{"text": f"red {n}", "label": [n % 2]} for n in range(8)]  # labels that are called 0 and 1
    table = table_of("multi-label", models["multi-label"], write_rows(tmp_path, one_each))
    assert plan(read(table)).task_data.data.outputs == ("0", "1")


@pytest.mark.parametrize(
    ("kind", "column", "first", "second"),
    [("multi-label", "label", "Cold", "cold"), ("token-classification", "tags", "B-PER", "b-per")],
)
def test_labels_and_tags_that_differ_in_case_only_are_reported(
    models: dict[str, Path], kind: str, column: str, first: str, second: str, tmp_path: Path
) -> None:
    rows = [
        {"text": "red", "tokens": ["red", "blue"], column: [first if n % 2 else second, "O"]}
        for n in range(8)
    ]
    notes = plan(read(table_of(kind, models[kind], write_rows(tmp_path, rows)))).notes
    assert any(f"differ only in case or spaces: {first!r} and {second!r}" in note for note in notes)


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("text-regression", {"score": 9.5}),
        ("multi-label", {"label": []}),
        ("token-classification", {"tags": ["O", "O", "O", "O"]}),
    ],
)
def test_a_test_row_with_another_target_is_the_same_input(
    models: dict[str, Path], kind: str, other: dict[str, Any], tmp_path: Path
) -> None:
    found = rows_of(kind, 8)
    test = write_rows(tmp_path, [{**found[0], **other}], "test.jsonl")
    table = table_of(kind, models[kind], write_rows(tmp_path, found))
    notes = plan(read(table, {"data.test": str(test), "data.validation": 0.0})).notes
    assert any("1 of 1 test rows are also training rows" in note for note in notes)


@pytest.mark.parametrize("tags", [["NOUN", "VERB"], ["U-PER", "L-PER"], ["0", "1"]], ids="-".join)
def test_tags_without_entities_are_reported(models: dict[str, Path], tags: list[str], tmp_path: Path) -> None:
    kind = "token-classification"
    rows = [{"tokens": ["red", "blue"], "tags": tags} for _ in range(8)]
    notes = plan(read(table_of(kind, models[kind], write_rows(tmp_path, rows)))).notes
    assert any("entity_f1 is not measured" in note for note in notes)


# -- forms of data -----------------------------------------------------------------------------------


def test_columns_of_0_and_1_are_the_same_labels_as_lists(models: dict[str, Path], tmp_path: Path) -> None:
    lists = rows_of("multi-label", 16)
    columns = [
        {
            "text": row["text"],
            **{name: int(name in row["label"]) for name in ("blue", "green", "grey", "red")},
        }
        for row in lists
    ]
    found = []
    for name, rows in (("lists", lists), ("columns", columns)):
        table = table_of("multi-label", models["multi-label"], write_rows(tmp_path, rows, f"{name}.jsonl"))
        if name == "columns":
            table["task"] = {**table["task"], "label_columns": ["blue", "green", "grey", "red"]}
        data = plan(read(table)).task_data
        assert data.data.outputs == ("blue", "green", "grey", "red")
        found.append(data.train.batch(range(16))["labels"])
    assert torch.equal(*found)
    assert found[0].sum(dim=1).unique().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("form", ["parquet", "saved"])
@pytest.mark.parametrize(
    ("kind", "column", "declared"),
    [
        ("token-classification", "tags", ["O", "B-PER", "I-PER"]),  # not sorted
        ("multi-label", "label", ["wide", "tall", "deep"]),
    ],
)
def test_declared_tags_and_labels_are_the_models_outputs_in_their_order(
    models: dict[str, Path], kind: str, column: str, declared: list[str], form: str, tmp_path: Path
) -> None:
    """Only a test row has the last one; the library itself is the oracle of the order."""
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "text": datasets.Value("string"),
            column: datasets.List(datasets.ClassLabel(names=declared)),
        }
    )

    def written(name: str, numbers: list[int], word: str) -> str:
        rows = [{"tokens": [word, "sea"], "text": f"{word} sea", column: numbers}] * 8
        data = datasets.Dataset.from_list(rows, features=features)
        assert data.features[column].feature.names == declared
        path = tmp_path / (f"{name}.parquet" if form == "parquet" else name)
        data.to_parquet(path) if form == "parquet" else data.save_to_disk(str(path))
        return str(path)

    table = table_of(kind, models[kind], Path(written("train", [1, 0], "red")))
    table["data"]["test"] = written("test", [2, 0], "blue")
    planned = plan(read(table))
    assert planned.outputs == tuple(declared)
    assert planned.task_data.test is not None
    labels = planned.task_data.test.batch([0])["labels"]
    assert (
        labels[labels >= 0] if kind == "token-classification" else labels[0].nonzero()
    ).flatten().tolist() == ([2, 0] if kind == "token-classification" else [0, 2])
    turned = plan(read(table, {"data.classes": declared[::-1]}))
    assert turned.outputs == tuple(declared[::-1])


def test_numbers_in_texts_are_those_of_json(models: dict[str, Path], tmp_path: Path) -> None:
    texts = ["-2.5", "+1e3", " 7 ", "5.", ".5", "1E-3", "007", "0.1e+01"]
    rows = [{"text": f"red {word}", "score": text} for word, text in zip(WORDS, texts, strict=False)]
    table = table_of("text-regression", models["text-regression"], write_rows(tmp_path, rows))
    labels = plan(read(table)).task_data.train.batch(range(8))["labels"]
    assert labels.tolist() == pytest.approx([-2.5, 1000, 7, 5, 0.5, 0.001, 7, 1])


def test_a_conll_file_is_the_same_data_as_lists(models: dict[str, Path], tmp_path: Path) -> None:
    kind = "token-classification"
    found = rows_of(kind, 12)
    sentences = [
        "\n".join(f"{w} X {t}" for w, t in zip(row["tokens"], row["tags"], strict=True)) for row in found
    ]
    (tmp_path / "own.conll").write_text("\n\n".join(sentences) + "\n")
    batches = [
        plan(read(table_of(kind, models[kind], path))).task_data.train.batch(range(12))
        for path in (write_rows(tmp_path, found), tmp_path / "own.conll")
    ]
    for name, value in batches[0].items():
        assert torch.equal(value, batches[1][name])


def test_a_regression_takes_pairs_and_frozen_features(models: dict[str, Path], tmp_path: Path) -> None:
    found = [
        {"first": row["text"].split()[0], "second": row["text"].split()[-1], "score": row["score"]}
        for row in rows_of("text-regression")
    ]
    table = table_of("text-regression", models["text-regression"], write_rows(tmp_path, found))
    table["task"] = {**TASKS["text-regression"], "text": ["first", "second"], "frozen_features": "head"}
    table["lora"]["target_modules"] = []
    table["method"] = {"name": "fedit"}
    result = run(table, out=tmp_path / "run", console=quiet())
    assert result.values("loss")[-1] < result.values("loss")[0]


def test_rows_that_lose_words_are_counted(models: dict[str, Path], tmp_path: Path) -> None:
    kind = "token-classification"
    found = [*rows_of(kind, 8), {"tokens": ["red"] * 30, "tags": ["B-COLOUR"] * 30, "client": "north"}]
    planned = plan(read(table_of(kind, models[kind], write_rows(tmp_path, found))))
    assert any("1 of 9 training rows lose 16 words" in note for note in planned.notes)
    labels = planned.task_data.train.batch([8])["labels"][0]
    assert labels.tolist() == [-100, *[0] * 14, -100]


def test_inputs_and_answers_that_are_cut_are_counted(models: dict[str, Path], tmp_path: Path) -> None:
    found = [*rows_of("seq2seq", 8), {"text": "red " * 30, "answer": "red " * 9, "client": "north"}]
    planned = plan(read(table_of("seq2seq", models["seq2seq"], write_rows(tmp_path, found))))
    notes = planned.notes
    assert any("1 of 9 training inputs are longer than task.max_length = 16" in note for note in notes)
    assert any("1 of 9 training answers are longer than task.max_answer_length = 4" in note for note in notes)
    whole, cut = (planned.task_data.train.batch([row])["labels"][0].tolist() for row in (0, 8))
    end = planned.task_data.train.batch([8])["input_ids"][0].tolist()[-1]  # of an input that is cut
    assert whole[-1] == end
    assert len(cut) == 4
    assert end not in cut  # the model does not learn to stop where an answer was cut


# -- where clients are ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["multi-label", "token-classification"])
def test_sites_that_hold_data_must_agree_on_the_labels(
    models: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    table = table_of(kind, models[kind], write_rows(tmp_path, rows_of(kind)), flower={"clients": ["a", "b"]})
    with pytest.raises(ConfigError, match=r"data.classes is missing: if sites hold the data"):
        plan(read(table), sites=("a", "b"))
    names = ("red", "green", "grey", "blue") if kind == "multi-label" else ("O", "I-COLOUR", "B-COLOUR")
    table["data"]["classes"] = names
    coordinator = plan(read(table), sites=("a", "b"))
    site = plan(read(table), site="a")
    assert coordinator.outputs == site.outputs == names
    assert len(coordinator.train) == 0
    loaded = site.task_data.load(empty=True)
    assert tuple(loaded.model.config.id2label.values()) == names


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_clients_in_processes_have_the_metrics_of_one_process(
    finished: Finished, kind: str, tmp_path: Path
) -> None:
    result, _ = finished(kind)
    config = read(result.folder / "config.toml", {"machine.jobs": 2})
    parallel = run(config, out=tmp_path / "run", console=quiet())
    for name in ("loss", find(kind).metrics[0]):
        assert parallel.values(name) == result.values(name)


@pytest.mark.parametrize("kind", KINDS)
def test_clients_own_models_are_measured_by_the_tasks_metrics(
    models: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    table = table_of(
        kind, models[kind], write_rows(tmp_path, rows_of(kind, 24)), evaluation={"clients": True}
    )
    table["training"] |= {"rounds": 1, "steps": 1}
    result = run(table, out=tmp_path / "run", console=quiet())
    own = {
        line["name"] for line in result.metrics if line["client"] == "0" and line["name"].startswith("own_")
    }
    every_round = {name for name in find(kind).metrics if name not in ("bleu", "exact_match")}
    every_round = {name for name in every_round if not name.startswith("rouge")}
    assert {f"own_{name}" for name in every_round} <= own


@pytest.mark.slow
@pytest.mark.report
def test_a_report_shows_the_tasks_metrics(models: dict[str, Path], tmp_path: Path) -> None:
    kind = "token-classification"
    table = table_of(kind, models[kind], write_rows(tmp_path, rows_of(kind, 16)))
    table["training"] |= {"rounds": 1, "steps": 1}
    run(table, out=tmp_path / "run", console=quiet())
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Final entity F1" in page
    assert "entity precision" in page
    assert (tmp_path / "run" / "entity_f1.png").is_file()
