"""A user's mistake is an error of the configuration; a bug in the code keeps its traceback."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from fedsmoothlora.config import read
from fedsmoothlora.data.partitioning import Partitioning, Rows
from fedsmoothlora.data.partitions import Partition
from fedsmoothlora.errors import ConfigError, DataError
from fedsmoothlora.runs.planning import plan


@dataclass(frozen=True, kw_only=True)
class Broken(Partitioning):
    """A partition that raises the given error."""

    kind: str = "broken"
    error: type[ValueError]

    def deal(self, rows: Rows, seed: int) -> Partition:
        raise self.error("something about rows")


def test_a_bug_is_not_taken_for_a_mistake_of_the_user(toy_table: dict[str, Any]) -> None:
    config = replace(read(toy_table), partition=Broken(error=ValueError))
    with pytest.raises(ValueError, match="something about rows") as caught:
        plan(config)
    assert type(caught.value) is ValueError


@pytest.mark.parametrize("error", [ConfigError, DataError])
def test_a_mistake_of_the_user_names_the_run(toy_table: dict[str, Any], error: type[ValueError]) -> None:
    config = replace(read(toy_table), partition=Broken(error=error))
    with pytest.raises(ConfigError, match=r"^toy: something about rows$"):
        plan(config)


@pytest.mark.parametrize(
    "partition",
    [
        {"kind": "iid", "clients": 97},
        {"kind": "dirichlet", "clients": 3, "alpha": 1.0, "min_size": 33},
        {"kind": "shards", "clients": 97},
        {"kind": "pathological", "clients": 97, "classes_per_client": 2},
        {"kind": "sizes", "sizes": [90, 90]},
    ],
)
def test_too_few_rows_for_a_partition_are_a_mistake_of_the_user(
    toy_table: dict[str, Any], partition: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"rows|clients"):
        plan(read({**toy_table, "partition": partition}))
