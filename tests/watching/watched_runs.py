"""Folders of runs, made by hand."""

import json
import time
from pathlib import Path
from typing import Any

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m\u202e"


def make_run(
    folder: Path, rounds: int = 2, *, planned: int = 2, client: str = "a", config: str = "", log: str = ""
) -> Path:
    """A run whose first ``rounds`` of ``planned`` rounds are recorded."""
    folder.mkdir(parents=True)
    text = f'name = "toy"\n[training]\nrounds = {planned}\n[method]\nname = "fedit"\n{config}'
    (folder / "config.toml").write_text(text, encoding="utf-8")
    (folder / "environment.json").write_text('{"experiment": "1"}', encoding="utf-8")
    (folder / "run.log").write_text(log, encoding="utf-8")
    for k in range(rounds + 1):
        add_round(folder, k, client)
    return folder


def add_round(folder: Path, k: int, client: str = "a", **metrics: float) -> None:
    """Append the metrics of a round."""
    lines: list[dict[str, Any]] = []
    if k:
        lines.append({"round": k, "client": client, "name": "train_loss", "value": 1 / k})
        metrics = {"bytes_up": 1e6, "bytes_down": 2e6, "refused": 0, "left_out": 0, "clients": 1, **metrics}
    metrics = {"accuracy": 1 - 0.9 / (k + 1), "loss": 2 / (k + 1), **metrics}
    lines += [{"round": k, "client": None, "name": name, "value": value} for name, value in metrics.items()]
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def in_progress(folder: Path, *, ago: float = 0, **values: Any) -> None:
    """Write ``progress.json``."""
    content = {"written": time.time() - ago, "rounds": 2, **values}
    (folder / "progress.json").write_text(json.dumps(content), encoding="utf-8")
