import errno
import hashlib
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from benchmarks.rows import anonymous_bytes
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.methods import Layer
from fedsmoothlora.modeling.backbone import MergedBackbone
from fedsmoothlora.storage.checkpoints import StoredUpdates

SHAPES = {"square": (32, 32), "wide": (16, 48), "tall": (48, 16), "large": (384, 384)}
SCALE = 1.7
RANK = 2


def layers_of(shapes: dict[str, tuple[int, int]]) -> dict[str, Layer]:
    return {
        name: Layer(name=name, m=m, n=n, rank=RANK, scale=SCALE, gradient_rank=min(m, n))
        for name, (m, n) in shapes.items()
    }


def modules_of(shapes: dict[str, tuple[int, int]], seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    return {name: nn.Linear(n, m, bias=False) for name, (m, n) in shapes.items()}


def product(m: int, n: int, generator: torch.Generator, rank: int = RANK) -> LowRank:
    return LowRank(torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator))


def update(generator: torch.Generator) -> dict[str, LowRank]:
    """A server update like that of the average: singular factors of a sum, in any memory order."""
    return {
        name: LowRank.weighted_sum([product(m, n, generator) for _ in range(3)], [0.2, 0.3, 0.5]).truncate(
            RANK
        )
        for name, (m, n) in SHAPES.items()
    }


def weights(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {name: module.weight.detach().clone() for name, module in modules.items()}


def test_weights_are_pretrained_plus_scaled_sum_and_shift() -> None:
    modules, generator = modules_of(SHAPES), torch.Generator().manual_seed(1)
    pretrained = weights(modules)
    backbone = MergedBackbone(modules, layers_of(SHAPES))
    first, second, shift = update(generator), update(generator), update(generator)
    backbone.merge(first)
    backbone.merge({"wide": second["wide"]})
    backbone.set_shift({"wide": shift["wide"], "tall": shift["tall"]})
    for name, weight in weights(modules).items():
        wanted = pretrained[name].double()
        parts = [first[name]]
        parts += [second[name], shift[name]] if name == "wide" else []
        parts += [shift[name]] if name == "tall" else []
        for part in parts:
            wanted = wanted + SCALE * (part.B.double() @ part.A.double())
        torch.testing.assert_close(weight.double(), wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(backbone.weight(name, shift[name] if name in ("wide", "tall") else None), weight)


def test_merging_becomes_effective_at_the_next_set_shift_only() -> None:
    modules = modules_of(SHAPES)
    pretrained = weights(modules)
    backbone = MergedBackbone(modules, layers_of(SHAPES))
    backbone.merge(update(torch.Generator().manual_seed(1)))
    assert all(torch.equal(weight, pretrained[name]) for name, weight in weights(modules).items())


def test_a_visit_does_not_change_the_start_of_the_next_client() -> None:
    modules, generator = modules_of(SHAPES), torch.Generator().manual_seed(2)
    backbone = MergedBackbone(modules, layers_of(SHAPES))
    backbone.merge(update(generator))
    backbone.set_shift()
    before = weights(modules)
    for _ in range(5):
        backbone.set_shift(update(generator))
        assert not torch.equal(modules["square"].weight, before["square"])
    backbone.set_shift()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(modules).items())


def digest(modules: dict[str, nn.Module]) -> str:
    found = hashlib.sha256()
    for name in sorted(modules):
        found.update(modules[name].weight.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


REBUILD = """
import hashlib, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from benchmarks.rows import anonymous_bytes
from fedsmoothlora.modeling.backbone import MergedBackbone
from fedsmoothlora.methods import Layer
from fedsmoothlora.algebra.lowrank import LowRank

folder, scale, rounds = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
modules, layers = {}, {}
for name, weight in load_file(folder / "pretrained.safetensors").items():
    m, n = weight.shape
    modules[name] = torch.nn.Linear(n, m, bias=False)
    modules[name].weight.data.copy_(weight)
    layers[name] = Layer(name=name, m=m, n=n, rank=2, scale=scale, gradient_rank=min(m, n))
backbone = MergedBackbone(modules, layers)
for number in range(1, rounds + 1):
    tensors = load_file(folder / "updates" / f"{number:04d}.safetensors")
    backbone.merge({name: LowRank(tensors[f"{name}/B"], tensors[f"{name}/A"]) for name in modules})
    backbone.set_shift()
    found = hashlib.sha256()
    for name in sorted(modules):
        found.update(modules[name].weight.detach().numpy().tobytes())
    print(found.hexdigest())
"""


@pytest.mark.slow
def test_a_new_process_rebuilds_every_rounds_weights_bit_for_bit_from_the_files(tmp_path: Path) -> None:
    rounds, generator = 50, torch.Generator().manual_seed(3)
    torch.set_num_threads(1)
    updates = StoredUpdates(tmp_path / "updates")
    modules = modules_of(SHAPES)
    save_file(weights(modules), tmp_path / "pretrained.safetensors")
    backbone = MergedBackbone(modules, layers_of(SHAPES))
    digests = []
    for _ in range(rounds):
        for _ in range(3):
            backbone.set_shift(update(generator))  # clients come and go
        merged = update(generator)
        backbone.merge(merged)
        updates.append(merged)
        backbone.set_shift()
        digests.append(digest(modules))
    done = subprocess.run(
        [sys.executable, "-c", REBUILD, str(tmp_path), str(SCALE), str(rounds)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(set(digests)) == rounds
    assert done.stdout.split() == digests


def test_the_sum_takes_no_more_memory_than_the_matrix_and_stays_exact() -> None:
    modules, generator = modules_of(SHAPES), torch.Generator().manual_seed(4)
    pretrained = weights(modules)
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    del modules["large"], total["large"]  # it would take 48 rounds
    backbone = MergedBackbone(modules, layers_of({name: SHAPES[name] for name in modules}))
    for _ in range(20):
        news = {name: value for name, value in update(generator).items() if name in modules}
        backbone.merge(news)
        for name in modules:
            m, n = SHAPES[name]
            total[name] += news[name].B.double() @ news[name].A.double()
            assert backbone._merged[name].nbytes <= 4 * m * n
            got = backbone.weight(name)
            wanted = pretrained[name].double() + SCALE * total[name]
            assert float((got - wanted).norm()) <= 1e-6 * float(wanted.norm())
    assert all(isinstance(merged, Tensor) for merged in backbone._merged.values())


def test_weights_stored_transposed_get_the_transposed_update() -> None:
    torch.manual_seed(5)
    module = Conv1D(24, 16)  # 16 in, 24 out
    pretrained = module.weight.detach().clone()  # (in, out)
    layers = layers_of({"c_attn": (24, 16)})
    backbone = MergedBackbone({"c_attn": module}, layers)
    merged, shift = (product(24, 16, torch.Generator().manual_seed(seed)) for seed in (6, 7))
    backbone.merge({"c_attn": merged})
    backbone.set_shift({"c_attn": shift})
    wanted = pretrained + SCALE * (merged.B @ merged.A + shift.B @ shift.A).mT
    torch.testing.assert_close(module.weight.detach(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(backbone.weight("c_attn", shift).mT, module.weight)


def test_a_low_precision_weight_is_refused_by_name() -> None:
    modules = modules_of(SHAPES)
    modules["wide"].to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"layer wide: the backbone is torch.bfloat16.*float32"):
        MergedBackbone(modules, layers_of(SHAPES))


def test_a_layer_of_another_shape_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"layer wide: weight \(16, 48\), expected \(48, 16\)"):
        MergedBackbone(modules_of({"wide": (16, 48)}), layers_of({"wide": (48, 16)}))


def test_pretrained_weights_take_no_anonymous_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    modules = {name: nn.Linear(2048, 2048, bias=False) for name in ("a", "b", "c", "d")}  # 64 MB
    conv = Conv1D(48, 32)
    kept = {name: module.weight.detach().clone() for name, module in modules.items()}
    layers = layers_of(dict.fromkeys(modules, (2048, 2048)) | {"conv": (48, 32)})
    before = anonymous_bytes()
    backbone = MergedBackbone({**modules, "conv": conv}, layers)
    for name in modules:
        backbone.set_shift({name: LowRank(torch.ones(2048, 1), torch.ones(1, 2048))})
        assert torch.equal(backbone.pretrained(name), kept[name])
    assert torch.equal(backbone.pretrained("conv"), conv.weight.mT)
    assert anonymous_bytes() - before < 24e6
    assert list(tmp_path.iterdir()) == []  # the file is gone when the process is, however it ends


def test_a_full_disk_is_reported_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", lambda *arguments: Full())
    with pytest.raises(OSError, match=r"1 MB of weights cannot be written to .*No space left.*TMPDIR"):
        MergedBackbone(modules_of(SHAPES), layers_of(SHAPES))
