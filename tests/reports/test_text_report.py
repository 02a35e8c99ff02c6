"""The page and the pictures of a run that has no accuracy."""

import json
from pathlib import Path

from fedsmoothlora.reports.report import write_report


def test_a_language_model_s_run_shows_loss_perplexity_and_exact_match(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('name = "own"\n[training]\nrounds = 2\n')
    metrics = {
        "loss": {0: 2.5, 1: 1.5, 2: 1.25},
        "perplexity": {0: 12.18, 1: 4.48, 2: 3.49},
        "exact_match": {0: 0.125, 2: 0.75},
        "train_loss": {1: 1.75, 2: 1.375},
    }
    lines = [
        {"round": round, "client": None, "name": name, "value": value}
        for name, series in metrics.items()
        for round, value in series.items()
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    for shown in ("Final exact match", "Final loss", "Final perplexity", "0.75", "3.49"):
        assert shown in page
    assert "Final accuracy" not in page
    assert (tmp_path / "exact_match.png").is_file()
    assert (tmp_path / "loss.png").is_file()
    assert not (tmp_path / "accuracy.png").exists()
