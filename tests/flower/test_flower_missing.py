"""Without Flower, everything but Flower works."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("flwr", "ray", "cryptography"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
sys.argv = ["fedsmoothlora", *sys.argv[1:]]
from fedsmoothlora.cli import main
main()
"""


def without_flower(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("arguments", [("--help",), ("list", "recipes"), ("flower", "--help")], ids=str)
def test_the_command_line_works_without_flower(arguments: tuple[str, ...]) -> None:
    done = without_flower(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    "arguments",
    [("run", "quickstart", "--engine", "flower"), ("flower", "key", "unused.key")],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_what_needs_flower_says_how_to_install_it(arguments: tuple[str, ...]) -> None:
    done = without_flower(*arguments)
    assert done.returncode == 2
    assert "pip install 'fedsmoothlora[flower]'" in done.stderr


def test_a_run_in_this_process_imports_no_flower() -> None:
    code = (
        "import sys, fedsmoothlora.runs.session, fedsmoothlora.runs.federation, fedsmoothlora.runs.check\n"
        "print(sorted(name for name in ('flwr', 'ray', 'cryptography') if name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
