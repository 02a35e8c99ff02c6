"""EleutherAI's lm-eval runs on both exports, from a task file on disk, without any network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Kind, delta, make_kinds, tiny_tokenizer

from fedsmoothlora.errors import GenerationError
from fedsmoothlora.exports.harness import evaluate_with_lm_eval
from fedsmoothlora.exports.merged import merge
from fedsmoothlora.exports.trained import Trained
from fedsmoothlora.logs import quiet_libraries

pytestmark = pytest.mark.slow
pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")

TASK = Path(__file__).parent / "lm_eval_task"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return make_kinds(tmp_path_factory.mktemp)["llama"]


def trained(kind: Kind) -> Trained:
    layers = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")]
    return Trained(deltas={n: delta(kind.base().model, n, 2, i) for i, n in enumerate(layers)})


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASK / "tiny_sums.jsonl").read_text().splitlines()]


@torch.no_grad()
def likelihoods(model: torch.nn.Module) -> list[list[float]]:
    """The log-likelihood of every option, one forward pass each."""
    tokenizer, found = tiny_tokenizer(), []
    for row in rows():
        prompt = tokenizer(f"question : {row['question']} answer :")["input_ids"]
        scores = []
        for option in row["options"]:
            answer = tokenizer(option)["input_ids"]
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            scores.append(float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()))
        found.append(scores)
    return found


def evaluate(model_args: str, here: Path) -> tuple[float, list[list[float]]]:
    """lm-eval's accuracy and its log-likelihoods of every option."""
    here.mkdir()
    for file in TASK.iterdir():  # lm-eval looks for a task's data from where it is started
        shutil.copy(file, here)
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", model_args]
    command += ["--tasks", "tiny_sums", "--include_path", ".", "--device", "cpu", "--batch_size", "2"]
    command += ["--output_path", "out", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(here / "home")}
    done = subprocess.run(
        command, cwd=here, env={**os.environ, **offline}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (results,) = (here / "out").rglob("results_*.json")
    (samples,) = (here / "out").rglob("samples_*.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    scores = [[float(answer[0]) for answer in line["filtered_resps"]] for line in lines]
    return json.loads(results.read_text())["results"]["tiny_sums"]["acc,none"], scores


@pytest.mark.release
def test_lm_eval_gives_both_exports_the_likelihoods_of_the_trained_model(llama: Kind, tmp_path: Path) -> None:
    with quiet_libraries():
        merged, adapter = (llama.write(trained(llama), as_, tmp_path / as_) for as_ in ("merged", "adapter"))
    model = llama.base().model
    before = likelihoods(model)
    merge(trained(llama), model)
    wanted = likelihoods(model)
    right = [
        max(range(3), key=row.__getitem__) == line["right"] for row, line in zip(wanted, rows(), strict=True)
    ]
    for name, model_args in (
        ("one", f"pretrained={merged},dtype=float32"),
        ("other", f"pretrained={llama.folder},peft={adapter},dtype=float32"),
    ):
        accuracy, found = evaluate(model_args, tmp_path / name)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(torch.tensor(found), torch.tensor(before), atol=0.05)
        assert accuracy == pytest.approx(sum(right) / len(right))


def test_the_trained_and_the_base_model_are_evaluated_by_lm_eval(
    llama: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in TASK.iterdir():
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)  # lm-eval looks for a task's data from where it is started
    with quiet_libraries():
        adapter = llama.write(trained(llama), "adapter", tmp_path / "adapter")
    (score,) = evaluate_with_lm_eval(adapter, ["tiny_sums"], include=tmp_path, batch_size=2)
    model = llama.base().model
    wanted = []
    for change in (False, True):
        if change:
            merge(trained(llama), model)
        chosen = [max(range(3), key=row.__getitem__) for row in likelihoods(model)]
        wanted.append(sum(one == row["right"] for one, row in zip(chosen, rows(), strict=True)) / len(rows()))
    assert (score.benchmark, score.metric, score.rows) == ("tiny_sums", "acc", len(rows()))
    assert [score.base, score.trained] == pytest.approx(wanted)
    assert score.interval is not None
    with pytest.raises(GenerationError, match="lm-eval has no task 'tiny_sum'"):
        evaluate_with_lm_eval(adapter, ["tiny_sum"], include=tmp_path)
