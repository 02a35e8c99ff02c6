import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from fedsmoothlora.data.media_sources import ImageData, load_images
from fedsmoothlora.data.partitioning.by_column import by_column
from fedsmoothlora.data.partitioning.by_file import by_file
from fedsmoothlora.data.settings import DataSettings
from tests.pixels import processor


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FEDSMOOTHLORA_CACHE", str(folder))
    return folder


def picture(path: Path, level: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), (level, level, level)).save(path)
    return path


def content(level: int) -> bytes:
    import io

    file = io.BytesIO()
    Image.new("L", (6, 6), level).save(file, "PNG")
    return file.getvalue()


def write_csv(path: Path, rows: list[list[Any]], header: tuple[str, ...] = ("image", "label")) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def load(source: Path | str, column: str | None = None, **keys: Any) -> ImageData:
    return load_images(DataSettings(source=str(source), **keys), 0, column)


def levels(data: ImageData) -> list[int]:
    """The grey level of each training image, which all its pixels have."""
    return data.train.processed(range(len(data.train)), processor(6))[:, 0, 0, 0].tolist()


def names(data: ImageData) -> list[str]:
    return [data.classes[label] for label in data.train.labels]


def refused(text: str, source: Path | str, column: str | None = None, **keys: Any) -> None:
    with pytest.raises(ValueError, match=text):
        load(source, column, **keys)


# -- what can be read ------------------------------------------------------------------------------


def image_folder(root: Path, images: dict[str, int]) -> Path:
    for name, level in images.items():
        picture(root / name, level)
    return root


def test_every_subfolder_of_an_image_folder_is_a_class(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "an [odd] *name*", {"b/1.png": 1, "a/2.PNG": 2, "a/test-1.png": 3})
    data = load(root)
    assert sorted(zip(levels(data), names(data), strict=True)) == [(1, "b"), (2, "a"), (3, "a")]
    assert data.classes == ("a", "b")
    assert (data.test, data.client_of_row, data.file_of_row, data.notes) == (None, None, None, [])


def test_numbered_classes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "x", {f"{name}/1.png": name for name in (10, 9, 1)})
    assert load(root).classes == ("1", "9", "10")


def test_names_of_splits_and_metadata_do_not_change_an_image_folder(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "x", {"train/1.png": 1, "kitten/test.png": 2})
    (root / "kitten" / "metadata.csv").write_text("file_name,label\ntest.png,wrong\n")
    data = load(root)
    assert sorted(zip(levels(data), names(data), strict=True)) == [(1, "train"), (2, "kitten")]
    assert len(data.notes) == 1


def test_files_of_unknown_type_are_ignored_and_counted(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "x", {"a/1.png": 1, "b/1.png": 2})
    for name in ("readme.txt", "a/Thumbs.db", "a/.DS_Store"):
        (root / name).write_text("x")
    (note,) = load(root).notes
    assert "2 files are of unknown type, not images, and ignored; first: readme.txt" in note


def test_every_subfolder_of_a_folder_of_image_folders_is_a_client(tmp_path: Path) -> None:
    images = {"site.1/a/1.png": 1, "site.1/b/2.png": 2, "site.2/a/3.png": 3, "home/b/4.png": 4}
    data = load(image_folder(tmp_path / "x", images))
    assert data.classes == ("a", "b")
    assert data.file_of_row is not None
    clients = by_file(data.file_of_row).clients
    assert {client: [levels(data)[row] for row in held] for client, held in clients.items()} == {
        "home": [4], "site.1": [1, 2], "site.2": [3],
    }  # fmt: skip


ROWS = [["p/1.png", "dog", "x"], ["p/2.png", "cat", "y"], ["p/3.png", "dog", "x"]]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_a_table_names_image_files_relative_to_itself(tmp_path: Path, kind: str) -> None:
    for number in (1, 2, 3):
        picture(tmp_path / "p" / f"{number}.png", number)
    header = ("file", "what", "who")
    path = tmp_path / f"table.{kind}"
    rows = [dict(zip(header, row, strict=True)) for row in ROWS]
    if kind == "csv":
        write_csv(path, ROWS, header)
    elif kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    data = load(path, "who", image_column="file", label_column="what")
    assert (levels(data), names(data), data.classes) == ([1, 2, 3], ["dog", "cat", "dog"], ("cat", "dog"))
    assert data.client_of_row == ["x", "y", "x"]
    assert data.file_of_row == [f"table.{kind}"] * 3
    assert list(by_column(data.client_of_row).clients) == ["x", "y"]


@pytest.mark.parametrize("kind", ["bytes", "large", "struct", "feature"])
def test_parquet_tables_may_contain_the_bytes_of_images(tmp_path: Path, kind: str) -> None:
    found = [content(5), content(6)]
    path = tmp_path / "t.parquet"
    if kind == "feature":
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["z", "a", "never"])}
        )
        values = [{"bytes": one, "path": None} for one in found]
        datasets.Dataset.from_dict({"image": values, "label": [0, 1]}, features=features).to_parquet(path)
    else:
        column = {
            "bytes": lambda: pa.array(found, pa.binary()),
            "large": lambda: pa.array(found, pa.large_binary()),
            "struct": lambda: pa.array([{"bytes": one, "path": "x.png"} for one in found]),
        }[kind]()
        parquet.write_table(pa.table({"image": column, "label": ["z", "a"], "extra": [1.5, None]}), path)
    data = load(path)
    assert levels(data) == [5, 6]
    assert names(data) == ["z", "a"]
    assert data.classes == (("z", "a", "never") if kind == "feature" else ("a", "z"))


def test_integer_labels_keep_their_order_however_they_are_written(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    wanted = ("-1", "2", "10")
    labels: list[Any] = [10, 2, -1, 2]
    written = write_csv(tmp_path / "a.csv", [["1.png", label] for label in labels])
    assert load(written).classes == wanted
    for kind, found in [("int", labels), ("float", [10.0, 2.0, -1.0, 2.0]), ("text", ["10", "2", "-1", "2"])]:
        path = tmp_path / f"{kind}.parquet"
        parquet.write_table(pa.table({"image": ["1.png"] * 4, "label": found}), path)
        assert load(path).classes == wanted
        assert names(load(path)) == ["10", "2", "-1", "2"]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"image": "1.png", "label": 1}\n{"image": "1.png", "label": "one"}\n')
    assert load(mixed).classes == ("1", "one")


def test_values_of_a_csv_file_stay_as_they_are_written(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    text = '\ufeffimage,label,site,x\r\n1.png,NA,007,\r\n\r\n"1.png","a, b",1e3,1\r\n1.png,null,x,y\r\n\r\n'
    (tmp_path / "t.csv").write_text(text, encoding="utf-8", newline="")
    data = load(tmp_path / "t.csv", "site")
    assert names(data) == ["NA", "a, b", "null"]
    assert data.client_of_row == ["007", "1e3", "x"]


def test_every_file_of_a_folder_of_tables_is_a_client(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        picture(tmp_path / "images" / f"{number}.png", number)
    write_csv(tmp_path / "b.csv", [["images/1.png", "x"]])
    (tmp_path / "a.jsonl").write_text('{"label": "y", "image": "images/2.png"}\n')
    parquet.write_table(pa.table({"image": [content(9)], "label": ["x"]}), tmp_path / "c.parquet")
    (tmp_path / "notes.txt").write_text("x")
    data = load(tmp_path)
    assert data.file_of_row == ["a.jsonl", "b.csv", "c.parquet"]
    assert levels(data) == [2, 1, 9]
    assert names(data) == ["y", "x", "x"]
    assert data.notes == [f"{tmp_path}: 1 file is of unknown type, not tables, and ignored; first: notes.txt"]


def test_a_test_set_has_the_classes_of_the_training_set(tmp_path: Path) -> None:
    train = image_folder(tmp_path / "train", {"a/1.png": 1, "b/1.png": 2, "c/1.png": 3})
    picture(tmp_path / "1.png")
    test = write_csv(tmp_path / "test.csv", [["1.png", "c"], ["1.png", "a"]])
    data = load(train, test=str(test))
    assert data.test is not None
    assert data.test.classes == data.classes == ("a", "b", "c")
    assert data.test.labels.tolist() == [2, 0]
    write_csv(test, [["1.png", "c"], ["1.png", "zebra"]])
    refused(
        r"test\.csv: row 2 \(the header not counted\), column 'label': the class 'zebra' is not in the "
        "training set, whose classes are a, b, c",
        train,
        test=str(test),
    )


def test_fewer_rows_are_drawn_by_the_seed_with_their_files_and_clients(tmp_path: Path) -> None:
    for number in range(20):
        picture(tmp_path / f"{number}.png", number)
    rows = [[f"{number}.png", number % 2, f"c{number}"] for number in range(20)]
    table = write_csv(tmp_path / "t.csv", rows, ("image", "label", "who"))
    data = load(table, "who", train_rows=8)
    assert data.client_of_row == [f"c{level}" for level in levels(data)]
    assert data.train.labels.tolist() == [level % 2 for level in levels(data)]
    assert len(data.file_of_row or []) == len(set(levels(data))) == 8
    again = load(table, "who", train_rows=8)
    other = load_images(DataSettings(source=str(table), train_rows=8), 1)
    assert levels(data) == levels(again) != levels(other)
    refused(r"data\.train_rows = 21: there are 20", table, train_rows=21)
    refused(r"data\.test_rows = 3: there is no test set", table, test_rows=3)


def test_rows_of_packaged_sets_are_drawn(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.undo()  # the real cache
    data = load("pkg:mnist-5k", train_rows=50, test_rows=10)
    assert data.test is not None
    assert (len(data.train), len(data.test), data.classes) == (50, 10, tuple("0123456789"))
    assert (data.client_of_row, data.file_of_row) == (None, None)


def test_nothing_is_written_beside_the_data_or_printed_and_a_changed_file_is_read_again(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "1.png")
    table = write_csv(tmp_path / "t.csv", [["1.png", "a"], ["1.png", "b"]])
    before = sorted(tmp_path.rglob("*"))
    bars = datasets.are_progress_bars_disabled()
    load(table)
    refused("missing", write_csv(tmp_path / "t.csv", [["1.png", "a"], ["1.png", ""]]))
    assert sorted(tmp_path.rglob("*")) == before
    assert not any(cache.iterdir())  # no copy of the rows stays
    assert capfd.readouterr() == ("", "")
    assert datasets.are_progress_bars_disabled() == bars
    write_csv(table, [["1.png", "a"], ["1.png", "c"]])
    assert load(table).classes == ("a", "c")


def test_settings_do_not_import_the_library() -> None:
    modules = "sys, fedsmoothlora.data.media_sources, fedsmoothlora.data.text_sources"
    code = f"import {modules}; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


PETS = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})

# -- the hub ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub with one data set, ``someone/pets``, in a local folder as a hub repository has it; its calls."""
    repository, calls, real = tmp_path / "repository", [], datasets.load_dataset
    for split, labels in [("train", [0, 1, 1]), ("test", [1, 0])]:
        values = [{"bytes": content(10 + label), "path": None} for label in labels]
        table = datasets.Dataset.from_dict({"image": values, "label": labels}, features=PETS)
        (repository / "data").mkdir(parents=True, exist_ok=True)
        table.to_parquet(repository / "data" / f"{split}-00000-of-00001.parquet")

    def fetched(path: str, **options: Any) -> Any:
        calls.append({"path": path, **options})
        if path != "someone/pets":
            raise ConnectionError("Couldn't reach the Hub")
        return real(str(repository), split=options["split"], cache_dir=str(tmp_path / "hub-cache"))

    monkeypatch.setattr(datasets, "load_dataset", fetched)
    return calls


def test_a_hub_id_is_fetched_with_its_revision_and_splits(hub: list[dict[str, Any]]) -> None:
    data = load("someone/pets", revision="abc", test_split="test")
    assert [(call["path"], call["revision"], call["split"]) for call in hub] == [
        ("someone/pets", "abc", "train"), ("someone/pets", "abc", "test"),
    ]  # fmt: skip
    assert data.classes == ("dog", "cat")  # the order that it publishes
    assert levels(data) == [10, 11, 11]
    assert data.test is not None
    assert data.test.labels.tolist() == [1, 0]
    assert load("someone/pets").test is None
    assert len(load("someone/pets", train_split="train[:2]").train) == 2


def test_a_data_set_that_the_hub_does_not_have_is_refused(hub: list[dict[str, Any]]) -> None:
    refused(
        r"'my/pats', revision the newest, split 'train': there is no such file or folder here, and it "
        "cannot be loaded from the Hugging Face hub: Couldn't reach the Hub",
        "my/pats",
    )
    refused("split 'dev': .*(?i:unknown split)", "someone/pets", test_split="dev")
    refused("give one of them", "someone/pets", test_split="test", test="there")
    refused(
        r"someone/pets \(train\): there is no column 'lable' \(data.label_column\); did you mean 'label'\? "
        "The columns are: image, label",
        "someone/pets",
        label_column="lable",
    )


def test_an_unlabelled_hub_row_is_refused(hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"bytes": content(1), "path": None}] * 2
    table = datasets.Dataset.from_dict({"image": values, "label": [0, -1]}, features=PETS)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    refused(r"\(train\): row 2 \(counted from 1\), column 'label': the label is missing", "someone/pets")


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([["1.png", "a"], ["2.png", "b"]], r"row 2 \(.*\), column 'image': there is no file '.*2\.png'"),
        ([["1.png", "a"], ["broken.png", "b"]], r"row 2 \(.*\), column 'image': the image cannot be read"),
        ([["1.png", "a"], ["empty.png", "b"]], r"row 2 \(.*\), column 'image': the image is empty: 0 bytes"),
        ([["1.png", "a"], ["t.csv", "b"]], "row 2 .*, column 'image': not an image that Pillow can read"),
        ([["1.png", "a"], ["", "b"]], r"row 2 \(.*\), column 'image': there is no image"),
        ([["1.png", "a"], ["1.png", ""]], r"row 2 \(.*\), column 'label': the label is missing$"),
        ([["1.png", "a"], ["1.png", ""], ["1.png", " "]], "row 2 .* missing, as in 1 rows after"),
        ([["1.png", "a"], ["1.png"]], r"row 2 \(.*\): 1 value for 2 columns: column 'label' is missing"),
        ([["1.png", "a"], ["1.png", "b", "c"]], r"row 2 \(.*\): 3 values for 2 columns"),
        ([["1.png", "a", "c"], ["1.png", "b", "c"]], r"row 1 \(.*\): 3 values for 2 columns"),
        ([["1.png", "a"], ["1.png", "a"]], "row 1 .*, column 'label': there is only one class, 'a'"),
        ([], "there are column names but no rows"),
    ],
)  # fmt: skip
def test_bad_rows_of_a_csv_file_are_named(tmp_path: Path, rows: list[list[Any]], text: str) -> None:
    whole = picture(tmp_path / "1.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[: len(whole) - 25])
    (tmp_path / "empty.png").touch()
    refused(rf"^{tmp_path}/t\.csv: {text}", write_csv(tmp_path / "t.csv", rows))


def test_broken_images_that_were_not_verified_are_found_when_they_are_used(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    table = write_csv(tmp_path / "t.csv", [["1.png", "a"], ["missing.png", "b"]])
    data = load(table, verify=False)
    with pytest.raises(ValueError, match=r"t\.csv: row 2 .*, column 'image': there is no file"):
        data.train.processed([0, 1], processor(6))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.table({"images": ["1.png"], "label": ["a"]}), path)
    elif kind == "csv":
        path.write_text("images,label\n1.png,a\n")
    else:
        path.write_text('{"images": "1.png", "label": "a"}\n')
    text = (
        r": there is no column 'image' \(data.image_column\); did you mean 'images'\? The columns are: images"
    )
    refused(f"^{path}{text}", path)
    text = r": there is no column 'who' \(partition.column\)\. The columns are: images, label"
    refused(f"^{path}{text}", path, "who", image_column="images")


GOOD = b'{"image": "1.png", "label": 1}\n'


@pytest.mark.parametrize(
    ("name", "found", "text"),
    [
        ("t.csv", "image,label\n1.png,a\n1.png,é\n".encode("latin-1"), "line 3 is not UTF-8.*xe9 at place 7"),
        ("t.jsonl", '{"image": "é", "label": 1}\n'.encode("latin-1"), "line 1 is not UTF-8 text"),
        ("t.csv", "image,label\n1.png,a\n".encode("utf-16"), "line 1 is not UTF-8 text"),
        ("t.csv", b"", "the file is empty"),
        ("t.jsonl", b"\n", "the file is empty"),
        ("t.parquet", b"", "the file is empty"),
        ("t.parquet", b"PAR1 no", "not a Parquet file"),
        ("t.csv", b"image,label,label\n1.png,a,b\n", "2 columns are called 'label'"),
        ("t.csv", b'image,label\n1.png,a\n"1.png,b\n', "cannot be read as csv"),
        ("t.jsonl", GOOD + b'{"image": "1.png", "label":\n', r"row 2 \(line 2\) is not valid JSON"),
        ("t.jsonl", GOOD + b'[1, 2]\n', r"row 2 \(line 2\) is not a JSON object: \[1, 2\]"),
        ("t.json", b'[{"image": "1.png", "label": 1},\n{"image": ]', "line 2 is not valid JSON"),
        ("t.jsonl", GOOD + b'{"image": "1.png"}\n', "row 2 .*, column 'label': the label is missing"),
        ("t.jsonl", GOOD + b'{"label": 2}\n', "row 2 .*, column 'image': there is no image"),
        ("t.jsonl", b'{"image": 3, "label": 1}\n', "row 1 .*, column 'image': has .*int64.*, neither"),
        ("t.xlsx", b"x", "unknown file type; should end in .csv, .jsonl, .json, .parquet"),
    ],
)  # fmt: skip
def test_a_damaged_or_unusable_file_is_named(tmp_path: Path, name: str, found: bytes, text: str) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / name).write_bytes(found)
    refused(f"^{re.escape(str(tmp_path / name))}: {text}", tmp_path / name)


def test_an_empty_parquet_table_and_broken_bytes_in_one_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(
        pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), path
    )
    refused(f"^{path}: there are column names but no rows", path)
    parquet.write_table(pa.table({"image": [content(1), content(1)[:40]], "label": [1, None]}), path)
    refused(rf"^{path}: row 2 \(counted from 1\), column 'label': the label is missing", path)
    parquet.write_table(pa.table({"image": [content(1), content(1)[:50]], "label": [1, 2]}), path)
    refused(rf"^{path}: row 2 \(counted from 1\), column 'image': the image cannot be read", path)


def test_a_missing_client_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    table = write_csv(
        tmp_path / "t.csv", [["1.png", "a", "x"], ["1.png", "b", ""]], ("image", "label", "who")
    )
    refused(r"t\.csv: row 2 .*, column 'who': the client is missing", table, "who")


def test_one_bad_file_of_several_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    write_csv(tmp_path / "a.csv", [["1.png", "a"], ["1.png", "b"]])
    write_csv(tmp_path / "b.csv", [["1.png", "a"], ["2.png", "b"]])
    refused(rf"^{tmp_path}/b\.csv: row 2 ", tmp_path)


def test_bad_image_folders_are_refused(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "x", {"a/1.png": 1, "b/1.png": 2})
    (root / "a" / "2.jpg").write_bytes(b"hello")
    refused(f"^{root}/a/2.jpg: not an image", root)
    (root / "a" / "2.jpg").unlink()
    (root / "c").mkdir()
    (root / "c" / "x.txt").touch()
    refused(rf"^{root}/c: the class folder has no images \(1 other files\)", root)
    picture(root / "c" / "1.png")
    picture(root / "loose.png")
    refused(f"^{root}/loose.png: the image is in no class folder", root)
    (root / "loose.png").unlink()
    (root / "a" / "x.zip").touch()
    refused(f"^{root}/a/x.zip: an archive", root)
    (root / "a" / "x.zip").unlink()
    refused("an image folder has no column 'who'.*by_file", root, "who")
    picture(root / "d" / "e" / "1.png")
    refused(f"^{root}: a has images and d has folders", root)


def test_bad_folders_of_image_folders_are_refused(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "x", {"one/a/1.png": 1, "two/b/1.png": 2})
    assert load(root).classes == ("a", "b")
    (root / "three").mkdir()
    refused(f"^{root}/three: the client's folder has no class folder", root)
    (root / "three").rmdir()
    picture(root / "two" / "b" / "deep" / "1.png")
    refused(f"^{root}/two/b/deep: a folder inside the class folder b", root)
    split = image_folder(tmp_path / "y", {"x/train/a.png": 1, "x/test/a.png": 2})
    refused("x: test, train look like splits", split)
    (tmp_path / "z").mkdir()
    refused(f"^{tmp_path}/z: there is nothing to read", tmp_path / "z")
    one = image_folder(tmp_path / "w", {"a/1.png": 1})
    refused(f"^{one}/a/1.png: there is only one class, 'a'", one)


@pytest.mark.parametrize(
    ("source", "keys", "text"),
    [
        ("pkg:mnist-5k", {"revision": "x"}, "revision = 'x' does not belong to data.source = 'pkg:mnist-5k'"),
        ("pkg:mnist-5k", {"test": "x"}, "data.test = 'x' does not belong"),
        ("pkg:mnist-5k", {"label_column": "x"}, "data.label_column = 'x' does not belong"),
        ("pkg:mnist-5k", {"path": "x"}, "pkg:mnist-5k has no data.path"),
        ("pkg:mnist", {}, "did you mean 'pkg:mnist-5k'"),
        (".", {"revision": "x"}, "data.revision = 'x' does not belong"),
        (".", {"test_split": "x"}, "data.test_split = 'x' does not belong"),
        (".", {"path": "x"}, "data.path = 'x' does not belong"),
        ("a/b", {"path": "x"}, "data.path = 'x' does not belong"),
        ("/no/such/place", {}, "data.source = '/no/such/place': there is no such file or folder"),
    ],
)  # fmt: skip
def test_keys_that_do_not_belong_to_the_source_are_refused(
    source: str, keys: dict[str, Any], text: str
) -> None:
    refused(text, source, **keys)


def test_a_missing_test_set_and_a_column_of_a_packaged_set_are_refused(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "x", {"a/1.png": 1, "b/1.png": 2})
    refused("data.test = '/no/where': there is no such file", root, test="/no/where")
    refused("has no column 'who'", "pkg:mnist-5k", "who")


def test_every_key_of_data_is_documented() -> None:
    documented = set(re.findall(r"^        (\w+):", DataSettings.__doc__ or "", re.M))
    assert documented == set(DataSettings.__dataclass_fields__)
    assert np.isclose(DataSettings(source="x").validation, 0)
