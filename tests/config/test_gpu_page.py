"""The configurations of docs/gpu.md are valid."""

import re
import tomllib
from pathlib import Path

from fedsmoothlora.config import read

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"


BLOCKS = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_configuration_of_the_page_is_valid() -> None:
    config = read(tomllib.loads(BLOCKS[0]))
    assert config.training.tokens_per_batch == 4096
    assert config.machine.keep_weights == "auto"
    assert config.model.attention == "sdpa"


def test_the_other_tables_fit_the_configuration_of_the_page() -> None:
    config = read({**tomllib.loads(BLOCKS[0]), **tomllib.loads(BLOCKS[1])})
    assert config.machine.deterministic
    assert config.machine.tf32 is False
    assert len(BLOCKS) == 2
