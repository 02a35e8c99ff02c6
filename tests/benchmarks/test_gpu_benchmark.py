import json

import pytest
import torch

from benchmarks.gpu import cases, main, settings_of
from fedsmoothlora.modeling.adapters import find_layers


@pytest.mark.slow
def test_the_script_runs_as_a_dry_run_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--dry-run"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in found] == [
        f"{title}: {what}"
        for title in ("tiny ViT", "tiny Llama, 2 x 16 tokens")
        for what in ("a round against PEFT training of as many batches", "tokens per second")
    ]
    assert all(row["value"] > 0 and row["against"] > 0 for row in found)


def test_the_models_of_a_gpu_have_their_published_sizes_and_settings_fit_them() -> None:
    sizes = {}
    for case in cases(dry_run=False):
        with torch.device("meta"):
            model = case.model()
        model.tie_weights()  # transformers 5.0 does not do so on the meta device
        sizes[case.title.split(",")[0]] = round(sum(value.numel() for value in model.parameters()) / 1e6)
        layers = find_layers(model, settings_of(case, "cuda").lora, (), head_is_trained_whole=False)
        assert {layer.rank for layer in layers.values()} == {case.r}
    assert sizes == {"ViT-S": 22, "SmolLM2-135M": 135, "Llama-3.2-1B": 1236}


def test_without_a_gpu_the_script_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        main([])
    assert "torch finds no GPU; --dry-run" in capsys.readouterr().err
