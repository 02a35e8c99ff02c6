"""A trained language model generates from a prompt that is formatted as in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Kind, delta, make_kinds, tiny_tokenizer
from typer.testing import CliRunner

from fedsmoothlora import cli
from fedsmoothlora.errors import ConfigError, ExportError, GenerationError, NoExportError
from fedsmoothlora.exports.export import write_folder
from fedsmoothlora.exports.generation import Conversation, Prompting, Writer, generate, load_writer
from fedsmoothlora.exports.merged import merge
from fedsmoothlora.exports.trained import Trained
from fedsmoothlora.logs import quiet_libraries


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return make_kinds(tmp_path_factory.mktemp)


def trained(kind: Kind) -> Trained:
    layers = [
        name for name in ("transformer.h.0.attn.c_attn", "model.layers.0.mlp.up_proj") if has(kind, name)
    ]
    return Trained(deltas={layer: delta(kind.base().model, layer, 2) for layer in layers})


def has(kind: Kind, name: str) -> bool:
    return any(name == there for there, _ in kind.base().model.named_modules())


def exported(kind: Kind, as_: str, out: Path, **about: Any) -> Path:
    with quiet_libraries():
        write_folder(trained(kind), kind.base(), kind.about(**about), as_, out)
    return out


@torch.no_grad()
def greedy(kind: Kind, text: str, count: int) -> str:
    """The likeliest tokens one by one, without a cache."""
    model, tokenizer = kind.base().model, tiny_tokenizer()
    merge(trained(kind), model)
    tokens = tokenizer(text)["input_ids"]
    first = len(tokens)
    for _ in range(count):
        token = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        tokens.append(token)
        if token == tokenizer.eos_token_id:
            break
    written: str = tokenizer.decode(tokens[first:], skip_special_tokens=True)
    return written


@pytest.mark.parametrize("as_", ["merged", "adapter"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_both_exports_generate_the_trained_models_likeliest_tokens(
    kinds: dict[str, Kind], tmp_path: Path, name: str, as_: str
) -> None:
    prompt = {"template": "question : {question} answer :"}
    folder = exported(kinds[name], as_, tmp_path / "out", prompt=prompt)
    found = generate(folder, "two + three", max_new_tokens=8)
    assert found == greedy(kinds[name], "question : two + three answer :", 8)
    assert found != greedy(kinds[name], "two + three", 8)


def test_the_command_prints_only_the_answer(kinds: dict[str, Kind], tmp_path: Path) -> None:
    folder = exported(kinds["llama"], "adapter", tmp_path / "out")
    command = ["generate", str(folder), "one two", "--max-new-tokens", "6"]
    done = CliRunner().invoke(cli.app, command)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == greedy(kinds["llama"], "one two", 6) + "\n"
    drawn = CliRunner().invoke(cli.app, [*command, "--temperature", "2", "--seed", "1"])
    assert (
        drawn.stdout == generate(folder, "one two", max_new_tokens=6, temperature=2.0, seed=1).strip() + "\n"
    )


def test_sampling_depends_only_on_the_seed(kinds: dict[str, Kind], tmp_path: Path) -> None:
    writer = load_writer(exported(kinds["llama"], "merged", tmp_path / "out"))

    def draw(seed: int, temperature: float = 1.0) -> str:
        return writer.write("one two", max_new_tokens=12, temperature=temperature, seed=seed)

    state = torch.random.get_rng_state()
    assert draw(0) == draw(0)
    assert len({draw(seed) for seed in range(4)}) > 1
    assert draw(0, 0.0) == draw(1, 0.0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_chat_is_a_turn_of_the_tokenizers_template() -> None:
    turns = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    chat = turns + "{% if add_generation_prompt %}answer :{% endif %}"
    tokenizer = tiny_tokenizer(chat_template=chat)
    asked = Prompting(template="what is {x} ?", chat=True, system="one").tokens(tokenizer, "two")
    assert tokenizer.decode(asked) == tokenizer.decode(
        tokenizer("system : one user : what is two ? answer :")["input_ids"]
    )


# With words that the tokenizer knows in place of the roles.
CHAT = (
    "{% set names = {'system': 'is', 'user': 'what', 'assistant': 'answer'} %}"
    "{% for m in messages %}{{ names[m.role] }} : {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}answer : {% endif %}"
)


class Rehearsed(Writer):
    """Keeps the text that it is given, and always answers "seven"."""

    def _generated(self, tokens: Any, *options: Any) -> str:
        seen.append(self.tokenizer.decode(tokens, skip_special_tokens=False))
        return " seven "


seen: list[str] = []


def rehearsed(kind: Kind, **prompting: Any) -> Rehearsed:
    seen.clear()
    return Rehearsed(kind.base().model, tiny_tokenizer(chat_template=CHAT), Prompting(**prompting))


def test_a_chat_keeps_its_turns_and_the_runs_system_message(kinds: dict[str, Kind]) -> None:
    chat = Conversation(rehearsed(kinds["llama"], template="what is {x} ?", chat=True, system="one"))
    assert [chat.say("two"), chat.say("three")] == ["seven", "seven"]
    contents = [message["content"] for message in chat.messages]
    assert contents == ["one", "what is two ?", "seven", "what is three ?", "seven"]
    begun = "is : one </s> what : what is two ? </s> answer :"
    assert seen == [begun, f"{begun} seven </s> what : what is three ? </s> answer :"]


def test_without_chats_in_training_a_turn_is_the_text_alone(kinds: dict[str, Kind]) -> None:
    chat = Conversation(rehearsed(kinds["llama"], template="question : {x}"))
    chat.say("two")
    assert seen == ["what : two </s> answer :"]


def test_a_chat_that_is_too_long_loses_its_oldest_exchanges_but_not_the_system_message(
    kinds: dict[str, Kind],
) -> None:
    # 32 positions: room for the system message and two exchanges.
    chat = Conversation(rehearsed(kinds["gpt2"], chat=True, system="one"), options={"max_new_tokens": 10})
    for word in ("two", "three", "four"):
        chat.say(word)
    assert seen[-1] == "is : one </s> what : three </s> answer : seven </s> what : four </s> answer :"
    with pytest.raises(GenerationError, match=r"the last turn has 40 tokens, and the model takes 32"):
        chat.say("five " * 31)


def test_a_chat_needs_a_chat_template(kinds: dict[str, Kind]) -> None:
    writer = Writer(kinds["llama"].base().model, tiny_tokenizer(), Prompting())
    with pytest.raises(GenerationError, match="needs a tokenizer with a chat template"):
        Conversation(writer)


def test_bytes_that_are_not_utf_8_are_refused(kinds: dict[str, Kind]) -> None:
    read = b"one \xff".decode(errors="surrogateescape")  # as Python reads arguments and standard input
    for prompting in ({}, {"chat": True}):
        writer = rehearsed(kinds["llama"], **prompting)
        for ask in (writer.write, Conversation(writer).say):
            with pytest.raises(GenerationError, match=r"not UTF-8 text: .* at character 5"):
                ask(read)


def test_an_answer_ends_with_the_models_or_the_templates_end_of_turn(kinds: dict[str, Kind]) -> None:
    tokenizer = tiny_tokenizer(chat_template=CHAT.replace("</s>", "<s>"))
    writer = Writer(kinds["llama"].base().model, tokenizer, Prompting(chat=True))
    assert tokenizer.convert_ids_to_tokens(writer._turn_ends) == ["</s>", "<s>"]


def test_the_command_chats_with_lines_of_standard_input(kinds: dict[str, Kind], tmp_path: Path) -> None:
    folder = exported(kinds["llama"], "merged", tmp_path / "out", prompt={"chat": True})
    tiny_tokenizer(chat_template=CHAT).save_pretrained(folder)
    command = ["generate", str(folder), "--chat", "--max-new-tokens", "4"]
    done = CliRunner().invoke(cli.app, command, input="one two\n\nthree\n")
    assert (done.exit_code, done.stderr) == (0, "")
    chat = Conversation(load_writer(folder), {"max_new_tokens": 4})
    assert done.stdout == f"{chat.say('one two')}\n{chat.say('three')}\n"
    first = CliRunner().invoke(cli.app, [*command, "one two"], input="three\n")
    assert first.stdout == done.stdout
    neither = CliRunner().invoke(cli.app, command[:2])
    assert neither.exit_code == 2
    assert "give a prompt, or --chat" in neither.stderr


def test_columns_of_the_system_message_are_given_as_json_too() -> None:
    chat = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    tokenizer = tiny_tokenizer(chat_template=chat)
    prompting = Prompting(template="what is {x} ?", chat=True, system="one {y}")
    asked = prompting.tokens(tokenizer, '{"x": "two", "y": "three"}')
    assert tokenizer.decode(asked) == tokenizer.decode(
        tokenizer("system : one three user : what is two ?")["input_ids"]
    )
    with pytest.raises(GenerationError, match="x, y: give them as JSON"):
        prompting.tokens(tokenizer, "two")


def test_several_columns_are_given_as_json(kinds: dict[str, Kind], tmp_path: Path) -> None:
    prompt = {"template": "{question} ? {options} answer :"}
    writer = load_writer(exported(kinds["llama"], "merged", tmp_path / "out", prompt=prompt))
    found = writer.write('{"question": "what is one", "options": "two or three"}', max_new_tokens=6)
    assert found == greedy(kinds["llama"], "what is one ? two or three answer :", 6)
    for wrong in (
        "what is one",
        '{"question": "what"}',
        "[1]",
        '{"question": "a", "options": "b", "c": "d"}',
    ):
        with pytest.raises(GenerationError, match=r"columns question, options: give them as JSON"):
            writer.write(wrong)


def test_numbers_out_of_range_and_prompts_that_are_too_long_are_refused(
    kinds: dict[str, Kind], tmp_path: Path
) -> None:
    writer = load_writer(exported(kinds["gpt2"], "merged", tmp_path / "out"))  # 32 positions
    for options in ({"temperature": -1.0}, {"max_new_tokens": 0}):
        with pytest.raises(GenerationError, match="at least 0 and 1"):
            writer.write("one", **options)  # type: ignore[arg-type]
    with pytest.raises(GenerationError, match=r"has 30 tokens, and the model takes 32.* at most 2 new"):
        writer.write("one " * 30, max_new_tokens=3)
    assert writer.write("one " * 30, max_new_tokens=2) is not None
    with pytest.raises(GenerationError, match="shorten"):
        writer.write("one " * 40, max_new_tokens=2)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_models_of_other_tasks_are_refused_with_the_supported_ones(
    kinds: dict[str, Kind], tmp_path: Path, name: str
) -> None:
    kind = kinds[name]
    folder = exported(kind, "merged", tmp_path / "out")
    with pytest.raises(GenerationError) as raised:
        generate(folder, "one")
    for word in (
        kind.task,
        "only causal language models",
        f"transformers.pipeline({kind.task!r}",
        str(folder),
    ):
        assert word in str(raised.value)


def test_a_folder_that_is_neither_run_nor_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"not a run's folder: it has no config\.toml"):
        generate(tmp_path, "one")
    (tmp_path / "fedsmoothlora.json").write_text("{")
    with pytest.raises(NoExportError, match=str(tmp_path)):
        generate(tmp_path, "one")


@pytest.mark.parametrize(
    ("device", "reason"),
    [("cuda:99", "this machine has|finds no accelerator"), ("mps", "lack"), ("gpu", "should be")],
)
def test_a_device_that_cannot_compute_is_refused_before_the_model_is_read(
    tmp_path: Path, device: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^device = '{device}': .*({reason})"):
        generate(tmp_path / "missing", "A", device=device)
