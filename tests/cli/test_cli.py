import io
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from rich.console import Console
from typer.testing import CliRunner

import fedsmoothlora
from fedsmoothlora import cli, config, methods
from fedsmoothlora.callbacks import RunInfo
from fedsmoothlora.data import partitioning
from fedsmoothlora.federation.engines.in_process import InProcess
from fedsmoothlora.runs import session
from fedsmoothlora.runs.console import ConsoleCallback
from fedsmoothlora.runs.session import run
from layer_names import NOT_QUERY, QUERY

Main = Callable[..., int]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Main:
    """The command line in this process; its exit code."""

    def call(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["fedsmoothlora", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return call


@pytest.fixture
def toy_file(toy_table: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "toy.toml"
    path.write_text(tomli_w.dumps(toy_table))
    return path


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--help"], "list"), (["run", "quickstart", "--set", "method.gama=1"], "gamma")]
)
def test_help_and_the_report_of_a_typo_take_less_than_half_the_time_of_importing_torch(
    arguments: list[str], said: str
) -> None:
    def seconds(*command: str) -> float:  # of the processor: a busy machine's clock on the wall says little
        nonlocal output
        began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        output = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began

    output: subprocess.CompletedProcess[str]
    times = [(seconds("-c", "import torch"), seconds("-m", "fedsmoothlora", *arguments)) for _ in range(3)]
    assert said in output.stdout + output.stderr
    torch, own = map(statistics.median, zip(*times, strict=True))
    assert own < torch / 2


# Run by another Python, one after the other; "init" goes into the folder in which that works.
LIGHT = [
    "--help",
    "--version",
    *(f"list {kind}" for kind in ("recipes", "models", "datasets", "methods", "partitions")),
    "config",
    "config training.lr",
    "config trainign",
    "show quickstart",
    "init quickstart",
    "migrate quickstart.toml",
    "run gone.toml",
    "run quickstart --set trainign.rounds=1",
    "run quickstart --set method.gama=1",
    "run quickstart --set method.name=fedti",
    "run quickstart --set partition.kind=idd",
    "run quickstart --engine flower --set training.lr=-1",
    "check quickstart --set training.roundz=1",
    "compare quickstart --methods fedit --out D --set task.knd=1",
    "tune quickstart --method fedit --grid training.lr=1,2 --out D --set training.lr=-1",
]


def test_commands_that_do_not_train_import_no_heavy_library(tmp_path: Path) -> None:
    code = f"""
import sys
from fedsmoothlora.cli import main
for command in {LIGHT!r}:
    sys.argv = ["fedsmoothlora", *command.split()]
    try:
        main()
    except SystemExit as stop:
        print("exit", stop.code)
    found = {{"torch", "transformers", "peft", "datasets", "matplotlib"}} & set(sys.modules)
    assert not found, (command, found)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exit 2") == done.stderr.count("error: ") == 10
    assert (tmp_path / "quickstart.toml").is_file()


@pytest.mark.parametrize("module", ["fedsmoothlora", "fedsmoothlora.cli"])
def test_importing_the_package_imports_no_heavy_library(module: str) -> None:
    code = f"import sys, {module}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft", "numpy", "datasets", "matplotlib"} & set(done.stdout.split())


def test_the_version_is_the_packages() -> None:
    done = CliRunner().invoke(cli.app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"fedsmoothlora {fedsmoothlora.__version__}\n")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("recipes", list(config.recipes())),
        ("models", ["pkg:dinov2-small", "pkg:minilm-l6-first-token"]),
        ("datasets", ["pkg:mnist-5k"]),
        ("methods", list(methods.names())),
        ("partitions", list(partitioning.names())),
    ],
)
def test_list_shows_everything_there_is(kind: str, names: list[str]) -> None:
    done = CliRunner().invoke(cli.app, ["list", kind])
    assert done.exit_code == 0
    lines = [line.split()[0] for line in done.stdout.splitlines() if line[:1].strip()]
    assert [name for name in names if name not in lines] == []


def test_an_unknown_kind_is_refused_with_those_there_are() -> None:
    done = CliRunner().invoke(cli.app, ["list", "cats"])
    assert done.exit_code == 2
    assert "recipes" in done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "quikstart"], "did you mean 'quickstart'"),
        (["run", "gone.toml"], "there is no such file"),
        (["run", "quickstart", "--set", "training.lr"], "KEY=VALUE"),
        (["run", "quickstart", "--set", "training.lr=-1"], "training.lr = -1"),
        (["run", "quickstart", "--set", "model.image_size=30"], "28 or 42"),
        (["run", "quickstart", "--set", "model.source=./no/where"], "there is no such folder"),
        (["run", "quickstart", "--set", "data.source=pkg:mnist"], "pkg:mnist-5k"),
        (["run", "quickstart", "--set", "data.train_rows=5000"], "there are 4000"),
        (["run", "quickstart", "--set", f'lora.target_modules=["{NOT_QUERY}"]'], QUERY),
        (["run", "quickstart", "--set", "lora.r=193"], "lora.r"),
        (["run", "quickstart", "--set", "partition.clients=4001"], "4001 clients"),
    ],
)
def test_an_error_is_one_message_and_exit_code_2(
    main: Main,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert "Traceback" not in captured.out + captured.err
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_a_folder_in_use_is_refused_before_any_work(
    main: Main, capsys: pytest.CaptureFixture[str], toy_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert main("run", toy_file, "--out", out) == 2
    assert f"{out} already exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_public_names_stay_functions_and_errors_are_plain_in_a_new_process(
    tmp_path: Path,
) -> None:
    code = (
        "import sys, fedsmoothlora as f\n"
        "for _ in range(2):\n"
        "    assert all(map(callable, (f.run, f.compare, f.tune))), (f.run, f.compare, f.tune)\n"
        "from fedsmoothlora.cli import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "gone.toml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.stderr == "error: gone.toml: there is no such file\n"
    assert done.returncode == 2


def test_without_a_terminal_there_are_plain_lines(
    main: Main, capsys: pytest.CaptureFixture[str], toy_file: Path, tmp_path: Path
) -> None:
    assert main("run", toy_file, "--set", "training.rounds=2", "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\r" not in said
    # Not the notes, ``round 2: ...``: with some draws of weights there are some.
    rounds = [line for line in said.splitlines() if line.startswith(("round 0/", "round 1/", "round 2/"))]
    assert [line.split()[1] for line in rounds] == ["0/2", "1/2", "2/2"]
    assert all("accuracy 0." in line for line in rounds)
    assert "MB" in rounds[-1] or "kB" in rounds[-1]
    assert said.count("LoRA rank 2 on 2 layers ") == 3


A_RUN = RunInfo(name="toy", folder=Path("runs/toy"), method="fedit", rounds=5, clients=3, layers={})


def test_in_a_terminal_a_bar_shows_the_clients_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    written = io.StringIO()
    callback = ConsoleCallback(Console(force_terminal=True, file=written, width=120))
    callback.on_run_begin(A_RUN)
    try:
        callback.on_round_begin(1, 5, 3)
        callback.on_client_begin("client-2", 7)
        callback.on_client_step("client-2", 0.12344)
        time.sleep(0.3)
        shown = written.getvalue()
    finally:
        callback.on_run_end()
    for words in ("rounds", "1/5", "round 2", "client client-2", "1/7", "loss 0.1234"):
        assert words in shown


def test_clients_that_train_at_once_have_a_bar_each() -> None:
    written = io.StringIO()
    callback = ConsoleCallback(Console(force_terminal=True, file=written, width=120))
    callback.on_run_begin(A_RUN)
    try:
        callback.on_round_begin(0, 5, 3)
        callback.on_client_begin("one", 7)
        callback.on_client_begin("two", 8)
        callback.on_client_step("one", 0.25)
        callback.on_client_step("two", 0.5)
        callback.on_client_step("two", 0.5)
        time.sleep(0.3)
        lines = written.getvalue().splitlines()
        assert any(("client one" in line) and ("1/7" in line) and ("loss 0.2500" in line) for line in lines)
        assert any(("client two" in line) and ("2/8" in line) and ("loss 0.5000" in line) for line in lines)
        callback.on_client_end("one")
        written.truncate(0)
        time.sleep(0.3)
        shown = written.getvalue()
        assert "client one" not in shown
        assert "client two" in shown
        assert "1/3" in shown
    finally:
        callback.on_run_end()


@pytest.mark.parametrize(
    ("arguments", "jobs"), [([], 1), (["--jobs", "3"], 3), (["--set", "machine.jobs=2"], 2)]
)
def test_jobs_is_the_key_of_the_configuration(
    arguments: list[str],
    jobs: int,
    toy_file: Path,
    main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained: list[int] = []
    made = session.build

    def spied(planned: Any, context: Any) -> Any:
        simulation = made(planned, context)
        trained.append(getattr(simulation.engine, "jobs", 1))
        simulation.engine = InProcess()  # this test is of the way there
        return simulation

    monkeypatch.setattr(session, "build", spied)
    assert main("run", toy_file, "--out", tmp_path / "out", "--quiet", *arguments) == 0
    assert trained == [jobs]
    assert config.read(tmp_path / "out" / "config.toml").machine.jobs == jobs


@pytest.mark.parametrize("jobs", ["0", "-1"])
def test_jobs_below_one_are_refused(
    jobs: str, toy_file: Path, main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("run", toy_file, "--out", tmp_path / "out", "--jobs", jobs) == 2
    assert f"machine.jobs = {jobs}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_brackets_in_a_name_are_printed_as_they_are(toy_table: dict[str, Any], tmp_path: Path) -> None:
    written = io.StringIO()
    overrides = {"name": "toy [v2]", "training.rounds": 1, "training.steps": 1}
    run(toy_table, overrides, out=tmp_path / "out", console=Console(file=written, width=200))
    assert "toy [v2]: fedsmoothlora" in written.getvalue()


def test_the_installed_command_is_this_one() -> None:
    command = Path(sys.executable).with_name("fedsmoothlora")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == f"fedsmoothlora {fedsmoothlora.__version__}\n"
