"""Recordings: files of several rates and lengths, runs, exports, and outputs without effects of padding."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from rich.console import Console
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

from fedsmoothlora import export, load_adapter
from fedsmoothlora.config import read
from fedsmoothlora.data.audio import AudioExamples
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.experiments import attacks
from fedsmoothlora.logs import quiet_libraries
from fedsmoothlora.modeling.audio import takes_padding
from fedsmoothlora.runs.check import check
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.session import run
from fedsmoothlora.tasks.objectives import RecordingClassification

soundfile = pytest.importorskip("soundfile")

RATE = 4000
FAMILIES = ("Wav2Vec2", "Hubert", "WavLM")
_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [8, 8],
    "conv_kernel": [10, 5],
    "conv_stride": [8, 4],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "activation_dropout": 0.0,
    "final_dropout": 0.0,
    "initializer_range": 0.2,
}


def config_of(family: str, norm: str = "layer", **more: Any) -> Any:
    return getattr(transformers, f"{family}Config")(
        **_SIZES, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer", **more
    )


def saved(folder: Path, family: str = "Wav2Vec2", norm: str = "layer") -> Path:
    """A tiny base model with random weights and its feature extractor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(transformers, f"{family}Model")(config_of(family, norm)).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(
        sampling_rate=RATE, return_attention_mask=norm == "layer"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {norm: saved(tmp_path_factory.mktemp(norm), norm=norm) for norm in ("layer", "group")}


def tone(pitch: float, seconds: float, rate: int, seed: int) -> Any:
    noise = np.random.default_rng(seed).normal(size=round(seconds * rate))
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(len(noise)) / rate) + 0.02 * noise


def saved_of_features(family: str, folder: Path) -> Path:
    """A tiny classifier of spectrograms, which are padded to one length by their own feature extractor."""
    if family == "AST":
        model: Any = transformers.ASTModel
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_length": 64}
        config: Any = transformers.ASTConfig(**sizes, intermediate_size=24, num_mel_bins=32)
        extractor: Any = transformers.ASTFeatureExtractor(sampling_rate=RATE, max_length=64, num_mel_bins=32)
    else:
        model = transformers.WhisperForAudioClassification
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 20}
        layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
        tokens = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = transformers.WhisperConfig(
            d_model=16, **heads, **layers, **tokens, max_source_positions=50, decoder_start_token_id=1
        )
        extractor = transformers.WhisperFeatureExtractor(feature_size=20, sampling_rate=16000, chunk_length=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model(config).save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


def write(folder: Path, each: int = 12) -> Path:
    """A folder for each of two pitches; lengths differ, and one file of each class has another rate."""
    for name, pitch in (("high", 900.0), ("low", 150.0)):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            rate = 8000 if number == 1 else RATE
            suffix = "flac" if number == 2 else "wav"
            wave = tone(pitch, 0.05 + 0.01 * (number % 4), rate, number)
            soundfile.write(folder / name / f"{number}.{suffix}", wave, rate)
    return folder


def table_of(model: Path, source: Path, **more: Any) -> dict[str, Any]:
    return {
        "name": "sounds",
        "model": {"source": str(model)},
        "lora": {"r": 2, "alpha": 4},
        "data": {"source": str(source), "validation": 0.25},
        "task": {"kind": "audio-classification"},
        "partition": {"kind": "iid", "clients": 2},
        "method": {"name": "fedsmoothlora", "gamma": 64, "calibration_batches": 1},
        "training": {"rounds": 2, "steps": 8, "batch_size": 6, "lr": 0.01},
        "machine": {"threads": 1, "device": "cpu"},
        **more,
    }


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_a_run_learns_and_its_exports_have_equal_outputs(
    models: dict[str, Path], tmp_path: Path, norm: str
) -> None:
    result = run(table_of(models[norm], write(tmp_path / "data")), out=tmp_path / "run", console=quiet())
    assert result.values("loss")[-1] < 0.8 * result.values("loss")[0]
    for as_ in ("merged", "adapter"):
        export(result.folder, as_, out=tmp_path / as_, console=quiet())
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "merged")
    assert extractor.sampling_rate == RATE
    inputs = extractor(tone(900, 0.1, RATE, 0), sampling_rate=RATE, return_tensors="pt")
    auto = AutoModelForAudioClassification
    with quiet_libraries(), torch.no_grad():
        merged = auto.from_pretrained(tmp_path / "merged").eval()
        base = auto.from_pretrained(models[norm], num_labels=2)
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        wanted = merged(**inputs).logits
        for model in (adapted, load_adapter(tmp_path / "adapter")):
            torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
    assert merged.config.id2label == {0: "high", 1: "low"}
    assert auto.__name__ in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("family", FAMILIES)
@given(lengths=st.lists(st.integers(60, 400), min_size=2, max_size=4), loud=st.floats(-9, 9))
@settings(max_examples=6, deadline=None)
def test_outputs_of_a_row_do_not_depend_on_its_padding(
    family: str, norm: str, lengths: list[int], loud: float
) -> None:
    """Neither on the length of the other rows nor on the values of the padding."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = getattr(transformers, f"{family}ForSequenceClassification")(config_of(family, norm))
    model.eval()
    assert takes_padding(model) == (norm == "layer" and family != "WavLM")
    rows = [torch.from_numpy(tone(300, length / RATE, RATE, length)).float() for length in lengths]
    values = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=loud)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(n, dtype=torch.int64) for n in lengths], True)
    batch = {"input_values": values, "attention_mask": mask, "labels": torch.zeros(len(rows)).long()}
    with torch.no_grad():
        padded = RecordingClassification()._logits(model, batch)
        alone = torch.cat([model(row[None]).logits for row in rows])
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


def test_batches_have_the_features_of_the_checkpoints_own_extractor(
    models: dict[str, Path], tmp_path: Path
) -> None:
    planned = plan(read(table_of(models["layer"], write(tmp_path / "data", 4))))
    train = planned.task_data.train
    assert isinstance(train, AudioExamples)
    batch = train.batch(range(len(train)))
    extractor = AutoFeatureExtractor.from_pretrained(models["layer"])
    paths = planned.task_data.data.train.places
    assert batch["input_values"].shape == batch["attention_mask"].shape == (8, max(train.lengths))
    for row, path in enumerate(paths):
        wave, rate = soundfile.read(path, dtype="float32")
        if rate == RATE:
            wanted = extractor(wave, sampling_rate=RATE, return_tensors="np").input_values[0]
            np.testing.assert_array_equal(batch["input_values"][row, : len(wanted)].numpy(), wanted)
            assert batch["attention_mask"][row].sum() == len(wanted) == train.lengths[row]
    assert any("2 of 8 training recordings have another sampling rate" in note for note in planned.notes)
    unkept = AudioExamples(
        planned.task_data.data.train,
        rate=RATE,
        longest=10**6,
        shortest=1,
        name="input_values",
        extract=planned.task_data._extractor,
        memory=0,
    )
    for name, value in unkept.batch(range(len(train))).items():
        assert torch.equal(value, batch[name])


@given(frames=st.integers(1, 3000), own=st.sampled_from([4000, 8000, 11025, 44100]))
@settings(max_examples=15, deadline=None)
def test_the_length_after_resampling_is_known_from_the_header(
    tmp_path_factory: pytest.TempPathFactory, frames: int, own: int
) -> None:
    from fedsmoothlora.data.read_media import Columns, read_local
    from fedsmoothlora.data.stored_audio import StoredAudio

    folder = tmp_path_factory.mktemp("lengths")
    (folder / "a").mkdir()
    soundfile.write(folder / "a" / "x.wav", np.zeros((frames, 2)), own)
    audio = read_local(folder, Columns(kind=StoredAudio, file="audio")).labelled(
        np.zeros(1, np.int64), ("a",)
    )
    assert isinstance(audio, StoredAudio)
    assert audio.samples(0, RATE).shape == (audio.format(0).frames_at(RATE),)


def test_a_table_names_the_files_and_the_clients(models: dict[str, Path], tmp_path: Path) -> None:
    write(tmp_path, 4)
    rows = [
        {
            "path": f"{name}/{number}.{'flac' if number == 2 else 'wav'}",
            "pitch": name,
            "who": "ab"[number % 2],
        }
        for name in ("high", "low")
        for number in range(4)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = table_of(models["layer"], tmp_path / "own.jsonl")
    table["data"] |= {"audio_column": "path", "label_column": "pitch"}
    table["partition"] = {"kind": "by_column", "column": "who"}
    planned = plan(read(table))
    assert (planned.classes, list(planned.partition.clients)) == (("high", "low"), ["a", "b"])


def test_check_reports_lengths_and_rows_that_are_cut(models: dict[str, Path], tmp_path: Path) -> None:
    out = io.StringIO()
    table = table_of(models["layer"], write(tmp_path / "data", 4))
    table["task"] = {**table["task"], "max_seconds": 0.065}
    check(read(table), Console(file=out, width=200))
    assert "training recordings: 0.05 to 0.065 s at 4000 Hz" in out.getvalue()
    assert "4 of 8 training recordings are longer than task.max_seconds = 0.065" in out.getvalue()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"nothing", r"low/bad\.wav: soundfile cannot read the recording: Format not recognised\.$"),
        (b"", r"low/bad\.wav: the audio is empty"),
        (np.zeros(0), r"low/bad\.wav: the recording has no samples"),
        (np.zeros(20), r"low/bad\.wav: the recording has 20 samples at 4000 Hz; the model takes 42"),
        (np.full(400, np.nan), r"low/bad\.wav: a sample is not a finite number"),
    ],
    ids=["no-audio", "empty", "no-samples", "short", "nan"],
)
def test_a_recording_that_cannot_be_used_is_refused_with_its_file(
    models: dict[str, Path], tmp_path: Path, content: Any, wanted: str
) -> None:
    bad = write(tmp_path / "data", 2) / "low" / "bad.wav"
    if isinstance(content, bytes):
        bad.write_bytes(content)
    else:
        soundfile.write(bad, content, RATE, subtype="FLOAT")
    with pytest.raises(ConfigError, match=wanted):
        plan(read(table_of(models["layer"], tmp_path / "data")))


def test_a_checkpoint_without_a_feature_extractor_is_refused(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    (model / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"its feature extractor \(preprocessor_config\.json\) is missing"):
        plan(read(table_of(model, write(tmp_path / "data", 2))))


@pytest.mark.parametrize("family", ["AST", "Whisper"])
def test_models_of_spectrograms_are_trained(family: str, tmp_path: Path) -> None:
    for name in ("high", "low"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(4):
            wave = tone(900 if name == "high" else 150, 0.2 + 0.1 * number, RATE, number)
            soundfile.write(tmp_path / "data" / name / f"{number}.wav", wave, RATE)
    table = table_of(saved_of_features(family, tmp_path / "model"), tmp_path / "data")
    table["training"] = {"rounds": 1, "steps": 2, "batch_size": 4, "lr": 0.05}
    table["method"] = {"name": "fedit"}
    check(read(table), quiet())
    result = run(table, out=tmp_path / "run", console=quiet())
    assert result.values("loss")[1] != result.values("loss")[0]


def test_a_recording_that_a_feature_extractor_cannot_use_is_refused(tmp_path: Path) -> None:
    model = saved_of_features("AST", tmp_path / "model")
    with pytest.raises(
        ConfigError, match=r"high/0\.wav: the model's feature extractor cannot use 200 samples"
    ):
        plan(read(table_of(model, write(tmp_path / "data", 2))))


def test_a_missing_soundfile_is_named_with_the_extra(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsmoothlora.tasks import base

    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"soundfile.*pip install 'fedsmoothlora\[audio\]'"):
        plan(read(table_of(models["layer"], tmp_path)))


def test_where_sites_hold_the_recordings_a_coordinator_has_none(
    models: dict[str, Path], tmp_path: Path
) -> None:
    source = write(tmp_path / "data", 4)
    table = table_of(models["layer"], source, flower={"clients": ["a", "b"]})
    table["data"] |= {"classes": ["low", "high"]}
    check(read(table), quiet())
    check(read(table), quiet(), site="a", data=str(source))


def test_a_backdoor_in_recordings_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    setting: Any = SimpleNamespace(planned=plan(read(table_of(models["layer"], write(tmp_path / "data", 2)))))
    assert "no trigger for recordings" in str(attacks.parsed("backdoor").refusal(setting))
