"""Direct preference optimisation: the loss, its reference, and runs on texts and chats."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM

from conftest import byte_tokenizer
from fedsmoothlora.config import read
from fedsmoothlora.data.packages import cache_folder
from fedsmoothlora.data.tokens import Completions, Pairs
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.exports.generation import load_writer
from fedsmoothlora.runs import session
from fedsmoothlora.runs.check import check
from fedsmoothlora.runs.planning import build, plan
from fedsmoothlora.runs.session import run
from fedsmoothlora.tasks.objectives import DirectPreference
from fedsmoothlora.tasks.objectives.preference import answer_likelihoods

Table = dict[str, Any]
BETA = 0.3


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSMOOTHLORA_CACHE", str(tmp_path / "cache"))


def texts(count: int = 40) -> list[dict[str, str]]:
    return [
        {"prompt": f"{n % 5}?", "chosen": " yes", "rejected": " no", "who": "north" if n % 3 else "south"}
        for n in range(count)
    ]


def chats(count: int = 12) -> list[dict[str, Any]]:
    """As UltraFeedback: both chats contain the prompt."""
    return [
        {
            "chosen": [{"role": "user", "content": f"{n % 5}?"}, {"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "user", "content": f"{n % 5}?"}, {"role": "assistant", "content": "no"}],
            "who": f"{n % 2}",
        }
        for n in range(count)
    ]


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
        "task": {"kind": "preference", "max_length": 64, "beta": BETA, **task},
        "partition": {"kind": "by_column", "column": "who"},
        "method": {"name": "fedsmoothlora", "gamma": 64, "calibration_batches": 1},
        "training": {"rounds": 2, "steps": 4, "lr": 0.02},
        "machine": {"threads": 1, "device": "cpu"},
    }


def quiet(settings: Any, out: Path, **more: Any) -> session.Result:
    return run(settings, out=out, console=Console(file=io.StringIO()), **more)


def pairs(count: int = 5) -> Pairs:
    generator = torch.Generator().manual_seed(0)

    def some(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(0, 256, (length,), generator=generator).tolist()

    prompts = [prompt for prompt in (some(1, 9) for _ in range(count)) for _ in range(2)]
    return Pairs(Completions(prompts, [some(1, 6) for _ in prompts], 257))


def alone(model: nn.Module, examples: Pairs, row: int) -> torch.Tensor:
    """The log-probability of one answer, from an unpadded row in float64."""
    ids, labels = examples.answers.row(row)
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(dim=-1)
    return torch.stack([logits[at, label] for at, label in enumerate(labels[1:]) if label >= 0]).sum()


@pytest.mark.parametrize("which", ["tiny_llama", "tiny_gpt2"])
def test_the_loss_and_the_metrics_are_the_formula_in_float64(
    which: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(which)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    examples, generator = pairs(), torch.Generator().manual_seed(1)
    examples.reference = torch.randn(10, generator=generator) - 20
    with torch.no_grad():
        policy = torch.stack([alone(model, examples, row) for row in range(10)])
    rewards = BETA * (policy - examples.reference.double())
    margins = rewards[0::2] - rewards[1::2]
    wanted = float(-(1 / (1 + (-margins).exp())).log().mean())
    objective = DirectPreference(BETA)
    assert objective.loss(model, examples.batch(range(5))).item() == pytest.approx(wanted, rel=1e-6)
    found = objective.evaluate(model, examples, 2, lambda batch: batch)
    assert found.metrics["loss"] == pytest.approx(wanted, rel=1e-6)
    assert found.metrics["reward_margin"] == pytest.approx(float(margins.mean()), rel=1e-6)
    assert found.metrics["preference_accuracy"] == int((margins > 0).sum()) / 5
    # And the reference is the same sum.
    torch.testing.assert_close(
        answer_likelihoods(model, examples.answers, 3, lambda batch: batch).double(),
        policy,
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_loss_and_the_rewards_are_trl_s(tiny_llama: Path) -> None:
    """`trl` computes the same batch with its own trainer."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    assert issubclass(type(byte_tokenizer()), PreTrainedTokenizerBase)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with torch.no_grad():  # some other policy
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    rows = [{"prompt": f"{n}+1?", "chosen": f" {n + 1}" * (n + 1), "rejected": " no"} for n in range(4)]
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(
            output_dir=str(tiny_llama / "trl"),
            beta=BETA,
            use_cpu=True,
            report_to=[],
            bf16=False,
            per_device_train_batch_size=4,
            disable_dropout=True,
            activation_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        wanted = float(trainer.compute_loss(model.eval(), batch))
    tokenizer = byte_tokenizer()
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows for _ in range(2)]
    answers = [[*tokenizer(row[side])["input_ids"], 256] for row in rows for side in ("chosen", "rejected")]
    examples = Pairs(Completions(prompts, answers, 257))
    examples.reference = answer_likelihoods(reference, examples.answers, 8, lambda batch: batch)
    with torch.no_grad():
        found = float(DirectPreference(BETA).loss(model, examples.batch(range(4))))
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("parts", [2, 3, 9])
def test_parts_keep_pairs_together_and_their_shares_give_the_loss(tiny_llama: Path, parts: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64).eval()
    examples, objective = pairs(), DirectPreference(BETA)
    examples.reference = -torch.arange(10.0)
    batch = examples.batch(range(5))
    found = objective.parts(batch, parts)
    assert len(found) == min(parts, 5)
    assert sum(share for _, share in found) == pytest.approx(1)
    with torch.no_grad():
        total = sum(share * float(objective.loss(model, part)) for part, share in found)
        assert total == pytest.approx(float(objective.loss(model, batch)), rel=1e-9)
    for part, _ in found:
        assert bool((part["reference"][0::2] - part["reference"][1::2] == 1).all())


@pytest.mark.parametrize("method", ["fedsmoothlora", "fedit", "full"])
def test_a_model_learns_preferences_from_the_pretrained_reference(
    method: str, tiny_llama: Path, tmp_path: Path
) -> None:
    settings = table(tiny_llama, write(tmp_path, texts()))
    if method != "fedsmoothlora":
        settings["method"] = {"name": method}
    if method == "full":
        settings["training"]["lr"] = 0.002
    result = quiet(settings, tmp_path / "run")
    losses, margins = result.values("loss"), result.values("reward_margin")
    # Before training the model is the reference, so both rewards are 0.
    assert losses[0] == pytest.approx(float(torch.tensor(2.0).log()), abs=1e-5)
    assert margins[0] == pytest.approx(0, abs=1e-5)
    assert result.values("preference_accuracy")[0] == 0.5
    assert losses[-1] < 0.6 * losses[0]
    assert result.values("preference_accuracy")[-1] == 1
    # The last loss is that of the saved model against the pretrained one, not against an earlier round.
    planned = plan(read(settings))
    rows = [row for own in planned.validation.values() for row in own.tolist()]
    answers = planned.task_data.train.answers  # type: ignore[attr-defined]
    trained, pretrained = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (tmp_path / "run" / "model", tiny_llama)
    )
    gains = answer_likelihoods(trained, answers, 8, lambda batch: batch) - answer_likelihoods(
        pretrained, answers, 8, lambda batch: batch
    )
    margin = BETA * (gains[0::2] - gains[1::2])[rows].mean()
    assert margins[-1] == pytest.approx(float(margin), rel=1e-3)


def test_the_reference_is_computed_once_and_read_again(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fedsmoothlora")
    settings = read(table(tiny_llama, write(tmp_path, texts(10))))
    first, second = plan(settings), plan(settings)
    build(first)
    (folder,) = (cache_folder() / "references").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    stamp = next(folder.iterdir()).stat().st_mtime_ns
    assert "computing the log-probabilities of 20 answers by the reference model" in caplog.text
    caplog.clear()
    build(second)
    assert "log-probabilities" not in caplog.text
    assert next(folder.iterdir()).stat().st_mtime_ns == stamp
    one, other = (planned.task_data.train.reference for planned in (first, second))  # type: ignore[attr-defined]
    assert torch.equal(one, other)
    assert bool(torch.isfinite(one).all())


def test_a_resumed_run_is_the_same(tiny_gpt2: Path, tmp_path: Path) -> None:
    settings = table(tiny_gpt2, write(tmp_path, texts(20)))
    settings["training"] |= {"steps": 1, "accumulation": 2, "precision": "bf16"}
    whole = quiet(settings, tmp_path / "whole")
    stopping = read(settings, {"training.rounds": 2})

    from fedsmoothlora.federation.client import Learner

    visit, calls = Learner.visit, 0

    def stop_in_round_2(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise KeyboardInterrupt
        return visit(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "visit", stop_in_round_2)
        with pytest.raises(KeyboardInterrupt):
            quiet(stopping, tmp_path / "cut")
    resumed = run(resume=tmp_path / "cut", console=Console(file=io.StringIO()))
    assert resumed.values("loss") == whole.values("loss")


def test_answers_that_are_chats_share_their_prompt(tiny_llama: Path, tmp_path: Path) -> None:
    settings = table(tiny_llama, write(tmp_path, chats()))
    planned = plan(read(settings))
    answers, tokenizer = planned.task_data.train.answers, byte_tokenizer()  # type: ignore[attr-defined]
    for row, answer in ((2, "yes"), (3, "no")):
        ids, labels = answers.row(row)
        assert tokenizer.decode(ids) == f"[user]1?<end>\n[assistant]{answer}<end>"
        assert tokenizer.decode([label for label in labels if label >= 0]) == f"{answer}<end>"
    assert any("the answers are chats" in note for note in planned.notes)
    result = quiet(settings, tmp_path / "run")
    assert result.values("loss")[-1] < result.values("loss")[0]
    writer = load_writer(tmp_path / "run")
    assert tokenizer.decode(writer.prompting.tokens(tokenizer, "1?")) == "[user]1?<end>\n[assistant]"


def test_prompts_that_are_chats_precede_the_answers(tiny_llama: Path, tmp_path: Path) -> None:
    apart = [
        {
            "prompt": row["chosen"][:-1],
            "chosen": row["chosen"][-1:],
            "rejected": row["rejected"][-1:],
            "who": row["who"],
        }
        for row in chats()
    ]
    (tmp_path / "apart").mkdir()
    whole, other = (
        plan(read(table(tiny_llama, source))).task_data.train.answers  # type: ignore[attr-defined]
        for source in (write(tmp_path, chats()), write(tmp_path / "apart", apart))
    )
    assert [whole.row(n) for n in range(24)] == [other.row(n) for n in range(24)]


def test_check_says_lengths_cuts_and_equal_answers(tiny_llama: Path, tmp_path: Path) -> None:
    found = texts(12)
    found[0] |= {"prompt": "x" * 80}
    found[1] |= {"rejected": " yes"}
    console = Console(file=io.StringIO(), width=200)
    check(read(table(tiny_llama, write(tmp_path, found))), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "1 of 12 training pairs have two equal answers, from which nothing is learned" in text
    assert "2 of 24 lose the beginning of their prompt" in text
    assert "training prompts with an answer: 6 to 64 tokens" in text


@pytest.mark.parametrize("form", ["texts", "chats"])
def test_both_answers_of_a_pair_follow_the_same_end_of_the_prompt(
    form: str, tiny_llama: Path, tmp_path: Path
) -> None:
    prompt, tokenizer = "abcdefghijklmnop" * 4, byte_tokenizer()
    sides = {"chosen": "yes" * 4, "rejected": "no" * 10}
    found: dict[str, Any] = {"prompt": prompt, **sides}
    if form == "chats":
        asked = {"role": "user", "content": prompt}
        found = {side: [asked, {"role": "assistant", "content": text}] for side, text in sides.items()}
        prompt = f"[user]{prompt}<end>\n[assistant]"
    source = write(tmp_path, [{**found, "who": f"{n % 2}"} for n in range(8)])
    answers = plan(read(table(tiny_llama, source, max_length=50))).task_data.train.answers  # type: ignore[attr-defined]
    # The room that the longer answer and its end leave.
    kept = tokenizer.decode(tokenizer(prompt)["input_ids"][-(50 - 20 - 1) :])
    for row, text in enumerate(sides.values()):
        ids, labels = answers.row(row)
        assert tokenizer.decode(ids) == f"{kept}{text}<end>"
        assert tokenizer.decode([label for label in labels if label >= 0]) == f"{text}<end>"


@pytest.mark.parametrize("form", ["texts", "chats"])
def test_cuts_of_answers_and_pairs_that_become_equal_are_reported(
    form: str, tiny_llama: Path, tmp_path: Path
) -> None:
    found: list[dict[str, Any]] = texts(8) if form == "texts" else chats(8)

    def say(row: int, chosen: str, rejected: str) -> None:
        for side, text in (("chosen", chosen), ("rejected", rejected)):
            if form == "texts":
                found[row][side] = text
            else:
                found[row][side][-1]["content"] = text

    say(0, "x" * 70 + "y", "x" * 70 + "z")  # differ behind the cut
    say(1, "x" * 90, "no")
    say(2, "no", "no")
    notes = plan(read(table(tiny_llama, write(tmp_path, found)))).notes
    assert any(
        "of 16 lose the beginning of their prompt, 3 the end of their answer" in note for note in notes
    )
    assert any(
        "2 of 8 training pairs have two equal answers, from which nothing is learned; 1 of them only because "
        "they are cut" in note
        for note in notes
    )


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_functions_of_chats_are_read_or_reported(suffix: str, tiny_llama: Path, tmp_path: Path) -> None:
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "<end>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    found = chats(8)
    for number, row in enumerate(found):
        row["tools"] = [{"name": "add", "x" if number % 2 else "y": "integer"}]
    source = tmp_path / f"own.{suffix}"
    if suffix == "jsonl":
        write(tmp_path, found)
    else:
        parquet.write_table(pa.Table.from_pylist(found), source)
    planned = plan(read(table(tiny_llama, source, chat_template=template, max_length=128)))
    answers, tokenizer = planned.task_data.train.answers, byte_tokenizer()  # type: ignore[attr-defined]
    for row in range(16):
        pair = found[row // 2]
        side = pair["rejected" if row % 2 else "chosen"]
        wanted = tokenizer.apply_chat_template(
            side, tools=pair["tools"], chat_template=template, return_dict=False
        )
        assert answers.row(row)[0] == wanted
    assert not any("leaves out" in note for note in planned.notes)
    notes = plan(read(table(tiny_llama, source))).notes  # its template writes no functions
    assert any("16 of 16 training chats have functions (column 'tools'), which" in note for note in notes)


@pytest.mark.parametrize("form", [texts, chats])
def test_a_column_system_that_no_template_names_is_reported(
    form: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    source = write(tmp_path, [{**row, "system": "Be brief."} for row in form(8)])
    note = "column 'system' is not read; name it in task.system"
    assert any(note in line for line in plan(read(table(tiny_llama, source))).notes)
    planned = plan(read(table(tiny_llama, source, chat=True, system="{system}")))
    assert not any(note in line for line in planned.notes)
    ids, _ = planned.task_data.train.answers.row(0)  # type: ignore[attr-defined]
    assert byte_tokenizer().decode(ids).startswith("[system]Be brief.<end>")


def test_functions_beside_texts_are_not_needed_in_test_data(tiny_llama: Path, tmp_path: Path) -> None:
    settings = table(tiny_llama, write(tmp_path, [{**row, "tools": []} for row in texts(8)]))
    (tmp_path / "test").mkdir()
    settings["data"] = {
        "source": str(tmp_path / "own.jsonl"),
        "test": str(write(tmp_path / "test", [{**row, "prompt": "x"} for row in texts(2)])),
    }
    plan(read(settings))
    write(tmp_path, [{**row, "tools": []} for row in chats(8)])
    write(tmp_path / "test", chats(10)[8:])
    with pytest.raises(ConfigError, match=r"no column 'tools' \(beside the chats of data\.source\)"):
        plan(read(settings))


def test_marks_that_leave_out_the_end_of_answers_are_reported(tiny_llama: Path, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q{{ m.content }}{% else %}A{% generation %}"
        "{{ m.content }}{% endgeneration %}{% endif %}<end>{% endfor %}"
    )
    notes = plan(read(table(tiny_llama, write(tmp_path, chats()), chat_template=template))).notes
    assert any("24 of 24 training chats have turns of the assistant whose end is outside" in n for n in notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"chosen": [{"role": "user", "content": "9?"}, {"role": "assistant", "content": "yes"}]},
            "row 3 .*the same but for their last turn",
        ),
        (
            {
                "chosen": [{"role": "assistant", "content": "yes"}],
                "rejected": [{"role": "assistant", "content": "n"}],
            },
            "row 3 .*there is no turn before the answers",
        ),
        ({"chosen": "yes"}, r"row 3 .*task\.chosen: holds 'yes'"),
    ],
    ids=["prompts-differ", "no-prompt", "text"],
)
def test_a_row_without_two_answers_to_one_prompt_is_refused(
    change: Table, message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    found = chats()
    found[2] |= change
    with pytest.raises(ConfigError, match=message):
        plan(read(table(tiny_llama, write(tmp_path, found))))


def test_a_chat_among_texts_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    found = texts(8)
    found[1]["chosen"] = json.dumps([{"name": "a call of a function"}])  # a text
    plan(read(table(tiny_llama, write(tmp_path, found))))
    found[3]["rejected"] = [{"role": "assistant", "content": "no"}]
    with pytest.raises(ConfigError, match=r"row 4.*an answer is a chat, and the chosen answer of the first"):
        plan(read(table(tiny_llama, write(tmp_path, found))))


def test_texts_without_a_prompt_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    found = [{key: value for key, value in row.items() if key != "prompt"} for row in texts()]
    with pytest.raises(ConfigError, match="has no column 'prompt'"):
        plan(read(table(tiny_llama, write(tmp_path, found))))
