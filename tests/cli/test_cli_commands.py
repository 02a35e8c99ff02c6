"""Every command through the command line, and its output."""

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import typer
from click.testing import Result
from typer.testing import CliRunner

from fedsmoothlora import cli
from fedsmoothlora.federation.client import Learner
from layer_names import VALUE

COMMANDS = sorted(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command line as users do, including errors and exit codes."""
    # main() is what turns errors into messages; the runner captures what it prints.
    runner, command = CliRunner(), typer.main.get_command(cli.app)

    class Whole(type(command)):  # type: ignore[misc]
        def main(self, args: Any = None, *_: Any, **__: Any) -> Any:
            monkeypatch.setattr(sys, "argv", ["fedsmoothlora", *(args or [])])
            cli.main()

    whole = Whole(name="fedsmoothlora")
    monkeypatch.setattr("typer.testing._get_command", lambda app: whole)

    def invoke(*arguments: str | Path) -> Result:
        return runner.invoke(cli.app, [str(argument) for argument in arguments])

    return invoke


Call = Callable[..., Result]


@pytest.fixture
def toy_file(toy_table: dict[str, Any], tmp_path: Path) -> Path:
    toy_table["training"] |= {"rounds": 2, "steps": 2}
    path = tmp_path / "toy.toml"
    path.write_text(tomli_w.dumps(toy_table))
    return path


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "120", "NO_COLOR": "1"})
    assert done.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.output)
    assert re.search(r"Examples?:", text)
    assert f"fedsmoothlora {command} " in text.split("Example", 1)[1]


def test_the_commands_are_those_described() -> None:
    assert set(COMMANDS) >= {"run", "check", "report", "list", "export", "generate"}
    help_text = CliRunner().invoke(cli.app, ["--help"]).output
    assert [command for command in COMMANDS if command not in help_text] == []


def test_check_writes_nothing(call: Call, toy_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(toy_file.parent)
    done = call("check", toy_file, "--set", "partition.clients=2")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "96 training rows" in done.stdout
    assert "a round: 2 clients" in done.stdout
    assert [path.name for path in toy_file.parent.iterdir()] == ["toy.toml"]


def test_check_and_run_refuse_the_same(call: Call, toy_file: Path, tmp_path: Path) -> None:
    mistake = ("--set", "model.image_size=30")
    checked, ran = (
        call("check", toy_file, *mistake),
        call("run", toy_file, *mistake, "--out", tmp_path / "run"),
    )
    refused(checked, "28 or 42")
    refused(ran, "28 or 42")
    assert checked.stderr == ran.stderr
    assert not (tmp_path / "run").exists()


def test_attack_refuses_a_mistake_in_one_line(call: Call, toy_file: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    refused(call("attack", toy_file, "--attacks", "scale,sgn_flip", *out), "did you mean 'sign_flip'")
    refused(call("attack", toy_file, "--defences", "mean,krum", *out), "unknown defence 'krum'")
    refused(call("attack", toy_file, "--attacks", "scale:factor=-1", *out), "scale.factor = -1")
    assert not (tmp_path / "out").exists()


@pytest.mark.report
def test_report_draws_the_page_of_a_finished_run_again(call: Call, toy_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call("run", toy_file, "--out", out, "--quiet").exit_code == 0
    page = out / "report.html"
    before = page.read_bytes()
    page.unlink()
    done = call("report", out)
    assert (done.exit_code, done.stdout.strip()) == (0, str(page))
    assert page.read_bytes() == before


@pytest.mark.parametrize("what", ["empty", "missing", "file"])
def test_report_of_a_folder_that_is_not_a_run_is_one_message(call: Call, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "photos"
    if what == "empty":
        folder.mkdir()
    elif what == "file":
        folder.write_text("x")
    refused(call("report", folder), str(folder))
    assert not (folder / "report.html").exists()


def test_a_run_is_exported_and_an_impossible_export_is_one_message(
    call: Call, toy_file: Path, tmp_path: Path
) -> None:
    out, adapter = tmp_path / "run", tmp_path / "adapter"
    assert call("run", toy_file, "--out", out, "--quiet").exit_code == 0
    done = call("export", out, "--as", "adapter:1", "--client", "1", "--out", adapter)
    assert (done.exit_code, done.stderr) == (0, "")
    assert re.search(rf"{VALUE} \(32 x 32\): rank 1 of 4, relative error \d\.\d\de-\d\d\n", done.stdout)
    assert done.stdout.endswith(f"adapter:1: {adapter}\n")
    assert (adapter / "adapter_model.safetensors").is_file()
    refused(call("export", out, "--out", adapter), str(adapter), "not empty")
    refused(call("export", out), "--out")
    refused(call("export", out, "--out", tmp_path / "x", "--private"), "go with --push")
    refused(call("export", out, "--push", "me/toy"), "add --yes")
    refused(call("export", out, "--push", "me/toy", "--yes", "--client", "1"), "stays with the client")
    refused(call("export", out, "--as", "lora", "--out", tmp_path / "x"), "'lora'", "adapter:RANK")
    refused(call("export", out, "--client", "7", "--out", tmp_path / "x"), "'7'", "0, 1, 2")
    refused(call("generate", out, "Hello"), "image-classification", f"fedsmoothlora export {out} --as merged")
    refused(call("generate", adapter, "Hello"), "only causal language models")


def test_an_interrupted_run_exits_130_and_the_printed_command_resumes_it(
    call: Call, toy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    visits, visit = 0, Learner.visit

    def interrupted(self: Learner, *arguments: Any) -> Any:
        nonlocal visits
        visits += 1
        if visits == 4:  # the first of the second round
            os.kill(os.getpid(), signal.SIGINT)
        return visit(self, *arguments)

    monkeypatch.setattr(Learner, "visit", interrupted)
    stopped = call("run", toy_file, "--out", out)
    assert stopped.exit_code == 130
    assert "Traceback" not in stopped.output
    assert "stopped in round 2" in stopped.stderr
    (command,) = re.findall(r"fedsmoothlora (run --resume \S+)", stopped.output)
    assert not (out / "model").exists()

    done = call(*command.split())
    assert done.exit_code == 0
    assert "resumed after round 1 of 2" in done.stdout
    assert "round 2/2" in done.stdout
    assert "round 1/2" not in done.stdout
    assert (out / "model" / "model.safetensors").is_file()


def test_resuming_a_finished_run_changes_nothing_and_other_settings_are_refused(
    call: Call, toy_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert call("run", toy_file, "--out", out).exit_code == 0
    before = (out / "metrics.jsonl").read_bytes()
    assert call("run", "--resume", out).exit_code == 0
    assert call("run", toy_file, "--resume", out).exit_code == 0
    assert (out / "metrics.jsonl").read_bytes() == before
    refused(call("run", "--resume", out, "--set", "training.lr=0.5"), "training.lr", str(out))
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_folder_to_resume_must_be_a_run(call: Call, tmp_path: Path) -> None:
    refused(call("run", "--resume", tmp_path), "--resume", str(tmp_path), "config.toml")


def test_out_and_resume_are_refused_together(call: Call, toy_file: Path, tmp_path: Path) -> None:
    refused(call("run", toy_file, "--out", tmp_path / "x", "--resume", tmp_path / "y"), "--out and --resume")
    assert not (tmp_path / "x").exists()


def test_run_without_arguments_says_what_is_missing(call: Call) -> None:
    refused(call("run"), "a TOML file or a recipe", "resume")


def test_without_a_command_the_help_is_printed(call: Call) -> None:
    done = call()
    assert "Usage: " in done.output
    for command in COMMANDS:
        assert command in done.output
