"""The tasks are found in their folder, and their files import neither torch nor transformers."""

import subprocess
import sys
from pathlib import Path

import pytest

from fedsmoothlora import tasks
from fedsmoothlora.errors import ConfigError

PACKAGE = Path(tasks.__file__).parent


def test_every_file_of_the_folder_is_a_task() -> None:
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "base", "registry"}
    assert {name.replace("-", "_") for name in tasks.names()} == files


@pytest.mark.parametrize("name", tasks.names())
def test_a_task_has_defaults_for_all_of_its_keys_and_a_name_on_the_hub(name: str) -> None:
    task = tasks.find(name)()
    assert task.kind == name
    alike = tasks.with_hub_name(task.hub_name)
    # Some tasks are one on the hub, and are loaded by the same class of transformers.
    assert (alike.hub_name, alike.auto_class) == (task.hub_name, task.auto_class)
    assert alike is type(task) or alike.kind in ("text-classification", "causal-lm", "image-classification")
    assert task.summary().endswith(".")


def test_an_unknown_task_is_refused_with_the_closest() -> None:
    with pytest.raises(ConfigError, match="unknown task 'causal-ml'; did you mean 'causal-lm'"):
        tasks.find("causal-ml")


def test_checking_the_keys_of_a_task_imports_no_library_of_models() -> None:
    code = (
        "import sys\nfrom fedsmoothlora import tasks\n"
        "[tasks.find(name)().check() for name in tasks.names()]\n"
        "tasks.find('seq2seq')(scores=('rouge', 'bleu')).check()\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "transformers", "numpy", "rouge_score", "sacrebleu"}


def test_files_of_tasks_import_no_library_of_models() -> None:
    code = "import sys\nfrom fedsmoothlora import tasks\ntasks.names()\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "transformers", "numpy"}
