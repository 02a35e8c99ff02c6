"""Variants at the bytes of a named one: the largest ranks, the same scale, the same ranks when resumed."""

import csv
import io
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from fedsmoothlora import cli
from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.experiments import budget as budgets
from fedsmoothlora.experiments import compare as compare_module
from fedsmoothlora.experiments import tables
from fedsmoothlora.experiments.budget import (
    TOLERANCE,
    Budget,
    Share,
    allowed,
    alpha_at,
    budget_of,
    largest_rank,
    recorded_budget,
    share_of,
)
from fedsmoothlora.experiments.budget_tables import budget_notes, factor_in_words, print_budget
from fedsmoothlora.experiments.compare import Prepared, compare, dry_run, prepare
from fedsmoothlora.experiments.tuning import tune
from fedsmoothlora.experiments.variants import collect, read_variants
from fedsmoothlora.modeling.settings import LoraSettings
from fedsmoothlora.runs.check import estimate
from fedsmoothlora.runs.planning import plan
from layer_names import QUERY

# The toy model: LoRA on query, key and value (32 x 32) of two layers, and a head of 4 classes, trained whole.
LAYERS, SIDE, HEAD_NUMBERS = 6, 32, 4 * 64 + 4
LOW = "low: fedsmoothlora method.preset=low_bit"
HALF = "fedit: fedit transport.bits=16"


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def table(toy_table: dict[str, Any]) -> dict[str, Any]:
    toy_table["training"] |= {"rounds": 1, "steps": 2}
    del toy_table["method"]
    return toy_table


def chosen(table: Mapping[str, Any], *methods: str, like: str = "fedit") -> Budget:
    variants = collect(methods)
    configs = {variant.label: read(table, variant.overrides) for variant in variants}
    found = budget_of(like, variants, configs, Path("no folder"))
    assert found is not None
    return found


def factors(rank: int, bits: int) -> int:
    """Bytes of one direction by hand: r (m + n) b / 8 for each layer, and a float32 scale per direction."""
    scales = 4 * rank if bits < 16 else 0
    return LAYERS * (rank * 2 * SIDE * bits // 8 + scales)


def test_the_chosen_rank_is_the_largest_whose_bytes_fit_counted_by_hand(table: dict[str, Any]) -> None:
    found = chosen(table, HALF, LOW, "half: ffa transport.bits=16")
    budget = 2 * (factors(2, 16) + 4 * HEAD_NUMBERS)
    fedit, low, half = (found.shares[label] for label in ("fedit", "low", "half"))
    assert (fedit.r, fedit.bytes, fedit.chosen) == (2, budget, False)

    def packed(rank: int) -> int:
        return 2 * (factors(rank, 4) + 2 * HEAD_NUMBERS)  # the head is sent as its change, in bfloat16

    assert packed(low.r) <= (1 + TOLERANCE) * budget < packed(low.r + 1)
    assert (low.up, low.down) == (packed(low.r) // 2, packed(low.r) // 2)
    assert half.r == 4  # one factor of two
    assert half.bytes == budget


@pytest.mark.parametrize("name", ["fedex", "fedsa", "fedsmoothlora", "flora", "frlora", "rolora"])
def test_the_next_rank_of_every_method_would_be_over_the_budget(table: dict[str, Any], name: str) -> None:
    found = share_of(plan(read(table, {"method.name": name})), budget=20_000)
    assert found.chosen

    def sent(rank: int) -> int:
        costs = estimate(plan(read(table, {"method.name": name, "lora.r": rank})))
        return costs.up + costs.down

    assert found.bytes == sent(found.r) <= allowed(20_000)
    assert sent(found.r + 1) > allowed(20_000)


def test_four_bits_at_rank_8_count_as_the_bytes_of_rank_2_in_bfloat16() -> None:
    assert allowed(1744) >= 1776
    assert allowed(1744) < 9 * (52 + 384) * 4 // 8 + 4 * 9


@given(
    slope=st.integers(1, 50),
    constant=st.integers(0, 500),
    saturated=st.integers(1, 10_000),
    most=st.floats(0, 5_000),
    first=st.integers(1, 70),
    highest=st.integers(1, 60),
)
@example(slope=1, constant=0, saturated=10_000, most=0.5, first=1, highest=1)
def test_the_search_finds_the_largest_rank(
    slope: int, constant: int, saturated: int, most: float, first: int, highest: int
) -> None:
    evaluated = []

    def bytes_at(rank: int) -> int:
        evaluated.append(rank)
        return constant + min(slope * rank, saturated)

    found = largest_rank(bytes_at, most, first=first, highest=highest)
    assert max(evaluated) <= min(highest, max(first, 2 * found))
    fitting = [rank for rank in range(1, highest + 1) if bytes_at(rank) <= most]
    assert found == max(fitting, default=0)


@given(
    r=st.integers(1, 512),
    rank=st.integers(1, 512),
    alpha=st.floats(0.01, 1000),
    use_rslora=st.booleans(),
)
def test_the_scale_of_the_lora_stays_the_same(r: int, rank: int, alpha: float, use_rslora: bool) -> None:
    lora = LoraSettings(r=r, alpha=alpha, use_rslora=use_rslora)
    other = LoraSettings(r=rank, alpha=alpha_at(lora, rank), use_rslora=use_rslora)
    assert other.scale_of(rank) == pytest.approx(lora.scale_of(r))
    assert alpha_at(lora, r) == alpha


def test_what_has_no_choice_keeps_its_rank_and_is_marked_where_it_is_over(table: dict[str, Any]) -> None:
    table["partition"]["clients"] = 2
    found = chosen(
        table,
        HALF,
        "own: fedit lora.r=3",
        "small: fedit lora.r=1",
        "full",
        "local",
        "listed: flora lora.client_ranks=[2,1]",
    )
    ranks = {label: (share.r, share.chosen) for label, share in found.shares.items()}
    kept = {"fedit": 2, "own": 3, "small": 1, "full": 2, "local": 2, "listed": 2}
    assert ranks == {label: (rank, False) for label, rank in kept.items()}
    assert [label for label in kept if found.is_over(label)] == ["own", "full", "listed"]
    assert found.shares["local"].bytes == 0
    full = (LAYERS * SIDE**2 + HEAD_NUMBERS) * 4
    assert found.factor("full") == 2 * full / found.shares["fedit"].bytes
    assert factor_in_words(found, "full") == f"× {found.factor('full'):.2f}, over the budget"
    assert factor_in_words(found, "fedit") == "× 1.00"
    (note,) = budget_notes(found)
    assert "Over the budget of fedit: own sends" in note
    assert "full sends" in note
    assert "(it has no rank to choose)" in note
    assert "local" not in note


def test_a_variant_that_is_over_at_rank_1_keeps_its_rank(table: dict[str, Any]) -> None:
    share = share_of(plan(read(table, {"method.name": "fedit"})), budget=10)
    assert (share.r, share.chosen, share.note) == (2, False, "rank 1 sends too much already")


def test_no_rank_is_chosen_that_the_method_refuses(table: dict[str, Any]) -> None:
    # A gradient-aligned start needs 2 r <= 32 directions.
    aligned = plan(read(table, {"method.name": "fedsmoothlora"}))
    assert budgets.highest_rank(aligned) == 16
    assert share_of(aligned, budget=10**9).r == 16
    assert share_of(plan(read(table, {"method.name": "fedit"})), budget=10**9).r == 32


@pytest.mark.parametrize("heads", [2, 4])
def test_ranks_that_heads_share_equally_are_searched_in_steps(table: dict[str, Any], heads: int) -> None:
    table["lora"]["r"] = 4

    def ravan(rank: int) -> Mapping[str, Any]:
        return {"method.name": "ravan", "method.heads": heads, "lora.r": rank}

    def sent(rank: int) -> int:
        costs = estimate(plan(read(table, ravan(rank))))
        return costs.up + costs.down

    planned = plan(read(table, ravan(4)))
    assert budgets.highest_rank(planned) == SIDE
    found = share_of(planned, budget=9_000)
    assert found.chosen
    assert found.bytes == sent(found.r) <= allowed(9_000) < sent(found.r + heads)
    small = share_of(planned, budget=10)
    assert (small.r, small.chosen, small.note) == (4, False, f"rank {heads} sends too much already")


def test_a_head_with_a_rank_of_its_own_keeps_it_and_its_new_scale_is_noted(table: dict[str, Any]) -> None:
    table["model"]["head"] = "lora"
    table["lora"] |= {"target_modules": [QUERY, "classifier"], "head_r": 2}
    found = chosen(table, "fedit", "ffa").shares["ffa"]
    assert found.r > 2
    assert "scale of the head" in found.note
    table["lora"]["target_modules"] = ["classifier"]
    assert not chosen(table, "fedit", "ffa").shares["ffa"].chosen


SHARES = {
    "fedit": Share(r=2, alpha=4.0, up=100, down=100, chosen=False, note="is the budget"),
    "zeta0.1": Share(r=7, alpha=14.0, up=90, down=103, chosen=True),
}


def test_the_table_of_a_budget_is_read_back() -> None:
    budget = Budget("fedit", SHARES)
    table = tomllib.loads(tomli_w.dumps({"bytes_like": budget.table()}))
    assert recorded_budget(table, Path("comparison.toml")) == budget
    assert recorded_budget({}, Path("comparison.toml")) is None


@pytest.mark.parametrize(
    "table",
    [
        "fedit",
        {"like": "fedit"},
        {"like": "fedit", "shares": {}},
        {"like": "fedit", "shares": {"fedit": {"r": "2"}}},
        {**Budget("fedit", SHARES).table(), "more": 1},
    ],
    ids=["text", "no-shares", "no-budget", "no-share", "unknown-key"],
)
def test_a_recorded_budget_that_cannot_be_read_is_refused_with_the_file(table: Any) -> None:
    with pytest.raises(ConfigError, match=r"comparison\.toml: more\.bytes_like"):
        recorded_budget({"bytes_like": table}, Path("comparison.toml"))


@pytest.mark.parametrize(
    ("like", "said"),
    [
        ("fedex", r"--bytes-like fedex: is none of the variants: fedit, local"),
        ("local", r"--bytes-like local: its clients send and receive nothing"),
    ],
)
def test_a_budget_that_is_none_is_refused(
    table: dict[str, Any], tmp_path: Path, begun: list[str], like: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        compare(table, ["fedit", "local"], out=tmp_path / "out", bytes_like=like, console=silent())
    assert begun == []
    assert not (tmp_path / "out").exists()


def prepared(table: dict[str, Any], methods: Sequence[str | Path], out: Path, like: str | None) -> Prepared:
    return prepare(table, collect(methods), out=out, seeds=1, jobs=1, bytes_like=like)


def ranks_of(found: Prepared) -> dict[str, int]:
    return {label: one.config.lora.r for (label, _), one in found.planned_runs.items()}


def test_a_dry_run_shows_the_ranks_in_80_columns_and_writes_nothing(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_module, "forecast", lambda *_: {})
    console = Console(file=io.StringIO(), width=80)
    dry_run(table, [HALF, LOW, "full"], out=tmp_path / "out", bytes_like="fedit", console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"^low +9 +2\.46 kB +2\.46 kB +× 0\.96 *$", shown, re.MULTILINE)
    assert re.search(r"^full +– .*over the budget; has no", shown, re.MULTILINE)
    assert "Over the budget of fedit: full sends" in shown
    assert not (tmp_path / "out").exists()


def test_a_resumed_comparison_has_the_ranks_that_its_folder_records(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = prepared(table, [HALF, LOW], out, "fedit")
    assert ranks_of(first) == {"fedit": 2, "low": 9}
    written = tomllib.loads((out / "comparison.toml").read_text(encoding="utf-8"))["more"]["bytes_like"]
    assert recorded_budget({"bytes_like": written}, out) == first.budget

    def counted_in_another_way(*_: object) -> tuple[int, int, int]:
        raise AssertionError("the bytes of recorded variants are not computed again")

    monkeypatch.setattr(budgets, "traffic", counted_in_another_way)
    again = prepared(table, [HALF, LOW], out, "fedit")
    assert again.budget == first.budget
    assert ranks_of(again) == ranks_of(first)
    for like in (None, "low"):
        with pytest.raises(ConfigError, match="these runs began with --bytes-like fedit"):
            prepared(table, [HALF, LOW], out, like)


def test_tables_and_page_have_ranks_and_bytes_and_mark_what_is_over(
    table: dict[str, Any], tmp_path: Path
) -> None:
    out, console = tmp_path / "out", Console(file=io.StringIO(), width=80)
    methods, fewer_charts = [HALF, LOW, "full"], {"evaluation.diagnostics": False}
    done = compare(table, methods, fewer_charts, out=out, seeds=1, bytes_like="fedit", console=console)
    lora = done.results.runs["low", 0].config.lora
    assert (lora.r, lora.scale_of(lora.r)) == (9, 2)
    text = (out / "comparison.csv").read_text(encoding="utf-8")
    rows = {row["variant"]: row for row in csv.DictReader(io.StringIO(text))}
    assert [row["rank"] for row in rows.values()] == ["2", "9", ""]
    assert [row["bits"] for row in rows.values()] == ["16", "4", "32"]
    assert [row["over_budget"] for row in rows.values()] == ["False", "False", "True"]
    assert {row["bytes_like"] for row in rows.values()} == {"fedit"}
    assert float(rows["fedit"]["bytes_up_of_client"]) == factors(2, 16) + 4 * HEAD_NUMBERS
    assert float(rows["low"]["bytes_up_of_client"]) == factors(9, 4) + 2 * HEAD_NUMBERS
    head, lines = tables.bytes_table(done.results)
    assert head == ["variant", "rank", "up", "down", "to target", "in all", "of fedit’s"]
    assert [line[1] for line in lines] == ["2", "9", "–"]
    assert lines[2][-1].endswith(", over the budget")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"^low +9 +2\.46 kB .*× 0\.96 *$", shown, re.MULTILINE)
    for name in ("comparison.md", "comparison.html"):
        text = (out / name).read_text(encoding="utf-8")
        assert "over the budget" in text
        assert "Over the budget of fedit: full sends" in text


def test_a_folder_that_began_without_a_budget_gets_none(table: dict[str, Any], tmp_path: Path) -> None:
    prepared(table, ["fedit"], tmp_path / "out", None)
    with pytest.raises(ConfigError, match="began without --bytes-like"):
        prepared(table, ["fedit", "ffa"], tmp_path / "out", "fedit")


def test_variants_that_are_added_later_get_the_recorded_budget(table: dict[str, Any], tmp_path: Path) -> None:
    prepared(table, ["fedit"], tmp_path / "out", "fedit")
    more = prepared(table, ["fedit", "ffa"], tmp_path / "out", "fedit")
    assert more.budget == chosen(table, "fedit", "ffa")
    assert ranks_of(more) == {"fedit": 2, "ffa": 4}


def test_tuning_chooses_the_ranks_of_compare_and_writes_them(table: dict[str, Any], tmp_path: Path) -> None:
    table["training"]["steps"] = 1
    grid, methods = {"training.lr": [0.01, 0.02]}, ["fedit", "ffa"]
    tune(table, methods, grid, out=tmp_path / "tuned", bytes_like="fedit", console=silent())
    file = tmp_path / "tuned" / "chosen.toml"
    found = {one.label: one.overrides for one in read_variants(file)}
    assert (found["ffa"]["lora.r"], found["ffa"]["lora.alpha"]) == (4, 8.0)
    assert "lora.r" not in found["fedit"]
    compared = prepared(table, [file], tmp_path / "out", "fedit")
    assert ranks_of(compared) == {"fedit": 2, "ffa": 4}
    assert compared.tuning["ffa"].record is not None
    assert compared.budget is not None
    assert compared.budget.factor("ffa") == chosen(table, *methods).factor("ffa")


@pytest.mark.parametrize(
    ("method", "key", "values"),
    [
        ("fedsmoothlora", "lora.r", [1, 2]),
        ("fedsmoothlora", "transport.bits", [16, 4]),
        ("fedsmoothlora", "method.preset", ["paper", "low_bit"]),
        ("fedsmoothlora", "method.gradient_aligned", ["client", "shared"]),
        ("ravan", "method.heads", [2, 4]),
        ("florist", "method.energy", [0.5, 1.0]),
        ("fed_svd", "method.refactor_every", [1, 3]),
    ],
)
def test_a_grid_that_changes_the_bytes_is_refused(
    table: dict[str, Any], tmp_path: Path, method: str, key: str, values: list[Any]
) -> None:
    with pytest.raises(ConfigError, match=f"--grid {key}: changes the bytes"):
        tune(
            *(table, [method], {key: values}),
            out=tmp_path / "out",
            bytes_like=method,
            console=silent(),
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["compare", "tune"])
def test_the_command_line_refuses_a_budget_of_no_variant(
    table: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    file = tmp_path / "toy.toml"
    file.write_text(tomli_w.dumps(table), encoding="utf-8")
    methods = ["--methods", "fedit"] if command == "compare" else ["--method", "fedit"]
    grid = [] if command == "compare" else ["--grid", "training.lr=0.01,0.02"]
    given = [command, str(file), *methods, *grid, "--bytes-like", "ffa", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["fedsmoothlora", *given])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "--bytes-like ffa: is none of the variants: fedit" in capsys.readouterr().err


def test_the_printed_budget_fits_80_columns() -> None:
    shares = {
        "fedsmoothlora": Share(r=128, alpha=256.0, up=916_000, down=1_140_000, chosen=True),
        "fedit": Share(r=8, alpha=16.0, up=915_000, down=915_000, chosen=False, note="is the budget"),
        "full": Share(r=8, alpha=1.0, up=10**9, down=10**9, chosen=False, note="has no rank to choose"),
    }
    console = Console(file=io.StringIO(), width=80)
    print_budget(Budget("fedit", shares), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert all(len(line) <= 80 for line in lines[:-1])
    assert "fedsmoothlora  128   916 kB  1.14 MB" in lines[2]
    assert math.isclose(Budget("fedit", shares).factor("full"), 10**9 / 915_000)
