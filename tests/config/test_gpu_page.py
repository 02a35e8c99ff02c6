"""The configuration of docs/gpu.md is valid."""

import re
import tomllib
from pathlib import Path

from fedsmoothlora.config import read

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"


def test_the_configuration_of_the_page_is_valid() -> None:
    [block] = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    config = read(tomllib.loads(block))
    assert config.training.tokens_per_batch == 4096
    assert config.machine.keep_weights == "auto"
    assert config.model.attention == "sdpa"
