"""State on disk is read back unchanged, or the damaged file is named."""

from __future__ import annotations

import ast
import json
import tempfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fedsmoothlora
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.config.settings import CheckpointSettings
from fedsmoothlora.errors import StateError
from fedsmoothlora.federation.client_state import ClientState, Segment
from fedsmoothlora.federation.initial_state import InitialState
from fedsmoothlora.federation.serialization import flatten, unflatten
from fedsmoothlora.federation.server import Server
from fedsmoothlora.methods import Layer, Products, Update
from fedsmoothlora.storage import hashed_files
from fedsmoothlora.storage.checkpoints import Checkpoints, StoredUpdates, restore
from fedsmoothlora.storage.client_store import StoredStates
from fedsmoothlora.storage.hashed_files import read_tensors, write_tensors

M, N = 6, 5
FACTORS = {"layer.q_proj": 2, "layer.v_proj": 1, "empty": 0}


class Notes(Callback):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def products(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(
            torch.randn(M, rank, generator=generator).to(dtype),
            torch.randn(N, rank, generator=generator).to(dtype).mT,  # not contiguous
        )
        for name, rank in FACTORS.items()
    }


def mixed(seed: int) -> Update:
    """Products, and a plain tensor, as kept by methods that exchange one factor."""
    plain = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    return {**products(seed), "layer.o_proj": plain, "count": torch.tensor(3)}


def client_state(seed: int = 0) -> ClientState:
    return ClientState(
        uploads={3: mixed(seed), 7: products(seed + 1, torch.bfloat16)},
        segments=(
            Segment(3, 5, products(seed + 2)),
            Segment(5, 6, {}),
            Segment(6, 7, products(seed + 3, torch.bfloat16)),
        ),
    )


KEPT = client_state()


def assert_same(found: Mapping[str, LowRank | Tensor], wanted: Mapping[str, LowRank | Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        other = found[name]
        assert type(other) is type(value)
        pairs = (
            [(value.B, other.B), (value.A, other.A)] if isinstance(value, LowRank) else [(value, other)]  # type: ignore[union-attr, list-item]
        )
        for one, two in pairs:
            assert one.dtype == two.dtype
            assert torch.equal(one, two)


def assert_same_state(found: ClientState, wanted: ClientState) -> None:
    assert found.uploads.keys() == wanted.uploads.keys()
    for round, upload in wanted.uploads.items():
        assert_same(found.uploads[round], upload)
    assert [(s.first, s.last) for s in found.segments] == [(s.first, s.last) for s in wanted.segments]
    for one, other in zip(found.segments, wanted.segments, strict=True):
        assert_same(one.updates, other.updates)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """The inodes of files; a file that is written again has another inode."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files_of(folder)}


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "cut by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer by a byte": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "first bit": lambda path: path.write_bytes(flipped(path.read_bytes(), 0)),
    "middle bit": lambda path: path.write_bytes(flipped(path.read_bytes(), path.stat().st_size * 4)),
    "last bit": lambda path: path.write_bytes(flipped(path.read_bytes(), path.stat().st_size * 8 - 1)),
    "not text": lambda path: path.write_bytes(b"\xff\xfe" * 50),
    "an empty object": lambda path: path.write_bytes(b"{}"),
    "a number": lambda path: path.write_bytes(b"1"),
}


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# --- clients' states


def test_a_clients_state_is_read_back_unchanged(tmp_path: Path) -> None:
    StoredStates(tmp_path, "run").save("a", client_state())
    callback = Notes()
    assert_same_state(StoredStates(tmp_path, "run").load("a", callback), client_state())
    assert callback.notes == []


def test_a_client_without_a_folder_is_new_and_not_noted(tmp_path: Path) -> None:
    callback = Notes()
    assert StoredStates(tmp_path, "run").load("a", callback) == ClientState()
    assert (callback.notes, list(tmp_path.iterdir())) == ([], [])


def test_a_client_without_state_has_a_folder_too(tmp_path: Path) -> None:
    states = StoredStates(tmp_path, "run")
    states.save("a", ClientState())
    assert_same_state(states.load("a", Callback()), ClientState())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), unique=True, max_size=5))
@example(["..", ".", "../..", "../../other", "/", "/etc/passwd", "a/b", "a", "b", "a\\b", "%2E%2E", "%2E."])
@example([" ", "  ", "\t", "\x00", "\n", "\u200b", "~", "CON", "e\u0301", "é", "state.json", "%", "%25"])
@example(["a.safetensors", "upload-0004", ".hidden", "-rf", "*", "?", "$HOME", "a:b", "\U0001f600" * 20])
def test_every_client_id_has_its_own_folder_inside_the_given_one(clients: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "deep" / "clients"
        states = StoredStates(folder, "run")
        kept = {
            client: ClientState(uploads={number: {"x": torch.tensor([number])}})
            for number, client in enumerate(clients)
        }
        for client, one in kept.items():
            states.save(client, one)
        callback = Notes()
        for client, one in kept.items():
            assert_same_state(states.load(client, callback), one)
        assert callback.notes == []
        homes = {path.parent.resolve() for path in files_of(Path(name))}
        assert len(homes) == len(clients)
        # The empty id, which no partition makes, has the given folder itself.
        assert all(home.parent == folder.resolve() for home in homes - {folder.resolve()})
        assert (folder.resolve() in homes) == ("" in clients)


@pytest.mark.parametrize(
    "client", ["x" * 300, "数据中心北京朝阳区医院放射科第一诊断室服务器编号零零一号机器"]
)
def test_long_client_ids_have_a_folder_too(tmp_path: Path, client: str) -> None:
    states = StoredStates(tmp_path, "run")
    states.save(client, KEPT)
    states.save(client + "y", ClientState())
    assert_same_state(states.load(client, Callback()), KEPT)


def test_another_runs_state_is_not_used_and_the_note_says_so(tmp_path: Path) -> None:
    StoredStates(tmp_path, "one run").save("a", KEPT)
    callback = Notes()
    assert StoredStates(tmp_path, "another").load("a", callback) == ClientState()
    assert len(callback.notes) == 1
    assert "client a" in callback.notes[0]
    assert "another run" in callback.notes[0]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("number", range(6))
def test_a_damaged_file_of_a_client_is_named_and_the_rest_is_used(
    tmp_path: Path, damage: str, number: int
) -> None:
    states = StoredStates(tmp_path, "run")
    states.save("a", KEPT)
    files = files_of(tmp_path)
    assert len(files) == 6  # state.json, two uploads, three segments
    DAMAGES[damage](files[number])
    callback = Notes()
    found = states.load("a", callback)
    if files[number].name == "state.json":
        assert found == ClientState()
        if damage == "deleted":  # like a client that was never there; who knows better is the server
            assert callback.notes == []
            return
    else:
        assert len(found.uploads) + len(found.segments) == 4
        for round, upload in found.uploads.items():
            assert_same(upload, KEPT.uploads[round])
        for one in found.segments:
            assert_same(one.updates, next(s for s in KEPT.segments if s.first == one.first).updates)
    assert len(callback.notes) == 1
    assert str(files[number]) in callback.notes[0]
    states.save("a", KEPT)  # and it is whole again
    assert_same_state(states.load("a", callback), KEPT)
    assert len(callback.notes) == 1


def test_a_file_that_is_there_already_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = StoredStates(tmp_path, "run")
    states.save("a", KEPT)
    before = stamps(tmp_path)
    written: list[str] = []
    real = hashed_files.write_bytes

    def write_bytes(path: Path, data: bytes) -> None:
        written.append(path.name)
        real(path, data)

    monkeypatch.setattr(hashed_files, "write_bytes", write_bytes)
    states.save("a", deepcopy(KEPT))
    assert written == ["state.json"]
    states.save("a", KEPT.with_upload(9, products(50)))
    assert len(written) == 3  # the upload, then state.json
    assert written[1].startswith("upload-0010-")
    assert written[2] == "state.json"
    after = stamps(tmp_path)
    assert {name: after[name] for name in before if name != "state.json"} == {
        name: stamp for name, stamp in before.items() if name != "state.json"
    }


def test_another_upload_of_the_same_round_does_not_touch_the_file_of_the_first_until_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any moment of a save, the state is the old one or the new one."""
    old, new = ClientState(uploads={3: products(1)}), ClientState(uploads={3: products(2), 4: products(3)})
    states = StoredStates(tmp_path, "run")
    real = hashed_files.write_bytes
    for allowed in range(4):
        states.save("a", old)
        left = [allowed]

        def write_bytes(path: Path, data: bytes, left: list[int] = left) -> None:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            real(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(hashed_files, "write_bytes", write_bytes)
            if allowed < 3:
                with pytest.raises(KeyboardInterrupt):
                    states.save("a", new)
            else:
                states.save("a", new)
        callback = Notes()
        assert_same_state(states.load("a", callback), old if allowed < 3 else new)
        assert callback.notes == []


def test_files_that_the_state_no_longer_names_are_removed(tmp_path: Path) -> None:
    states = StoredStates(tmp_path, "run")
    states.save("a", KEPT)
    states.save("b", KEPT)
    (tmp_path / "a" / "upload-0001-0123456789abcdef.safetensors").write_bytes(b"left by a killed process")
    states.save("a", ClientState(uploads={7: KEPT.uploads[7]}))
    assert [path.name[:12] for path in files_of(tmp_path / "a")] == ["state.json", "upload-0008-"]
    assert len(files_of(tmp_path / "b")) == 6


# --- the server's updates


def test_updates_can_only_be_appended(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "updates"
    updates = StoredUpdates(folder)
    kept: list[Products] = [products(0), {}, products(1, torch.bfloat16)]
    for one in kept:
        updates.append(one)
    assert [path.name for path in files_of(folder)] == [f"000{i}.safetensors" for i in (1, 2, 3)]
    again = StoredUpdates(folder, updates.hashes)
    for stored in (updates, again):
        assert len(stored) == 3
        for found in (list(stored), stored[:], [stored[0], *stored[1:9]], stored[-3:]):
            for one, wanted in zip(found, kept, strict=True):
                assert_same(one, wanted)
        assert stored[2:2] == []
        with pytest.raises(IndexError):
            stored[3]
    with pytest.raises(ValueError, match="appended"):
        updates.insert(1, products(2))
    with pytest.raises(TypeError, match="cannot be changed"):
        updates[0] = products(2)
    with pytest.raises(TypeError, match="cannot be removed"):
        del updates[0]
    assert len(files_of(folder)) == 3


def test_updates_support_negative_indices(tmp_path: Path) -> None:
    updates = StoredUpdates(tmp_path)
    updates.append(products(0))
    assert_same(updates[-1], products(0))


def test_the_order_of_updates_is_that_of_rounds_beyond_four_digits(tmp_path: Path) -> None:
    updates = StoredUpdates(tmp_path, ["?"] * 9_999)
    updates.append(products(1))
    assert [path.name for path in files_of(tmp_path)] == ["10000.safetensors"]
    assert_same(updates[9_999], products(1))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_update_is_named(tmp_path: Path, damage: str) -> None:
    updates = StoredUpdates(tmp_path)
    for seed in range(3):
        updates.append(products(seed))
    file = tmp_path / "0002.safetensors"
    DAMAGES[damage](file)
    with pytest.raises(StateError, match="0002") as caught:
        updates[1]
    assert str(file) in str(caught.value)
    assert_same(updates[2], products(2))


# --- checkpoints


def server(round: int = 0) -> Server:
    method = read({"name": "x", "model": {"source": "x"}, "data": {"source": "x"}}).method
    layers = {"w": Layer(name="w", m=M, n=N, rank=2, scale=1.0, gradient_rank=N)}
    head = {"head.weight": torch.zeros(3, 4), "head.bias": torch.zeros(3, dtype=torch.float64)}
    origin = InitialState(layers, 0, lambda name: torch.zeros(M, N))
    return Server(method=method, layers=layers, initial_state=origin, rounds=9, head=head, round=round)


def advance(there: Server, seed: int = 0) -> None:
    """Change everything that a round changes."""
    there.updates.append(products(seed))
    there.model = products(seed + 1)
    there.lora = mixed(seed + 3)
    there.memory = mixed(seed + 2)
    there.head = {name: torch.randn_like(value) for name, value in there.head.items()}
    there.received |= {"a/b": there.round, "é..": there.round}
    there.accepted |= {"a/b": there.round}
    there.samples |= {"a/b": 10**6}
    there.round += 1


def saved(folder: Path, rounds: int, keep: int = 2, best: int = 0) -> tuple[Checkpoints, Server]:
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointSettings(keep=keep))
    there, updates = server(), StoredUpdates(folder / "updates")
    there.experiment, there.updates = "run", updates
    for seed in range(rounds):
        advance(there, 10 * seed)
        checkpoints.save(there, updates, {"best_round": min(best, there.round), "metrics_length": 77})
    return checkpoints, there


def test_a_server_that_is_restored_is_the_one_that_was_saved(tmp_path: Path) -> None:
    checkpoints, there = saved(tmp_path, 3)
    path, *_ = Checkpoints(tmp_path / "checkpoints", CheckpointSettings()).newest_first()
    checkpoint, tensors, updates = checkpoints.load(path, tmp_path / "updates")
    again = server()
    restore(again, checkpoint, tensors, updates)
    assert (checkpoint.round, again.round, again.experiment) == (3, 3, "run")
    assert checkpoint.table["progress"] == {"best_round": 0, "metrics_length": 77}
    for name in ("received", "accepted", "samples"):
        assert getattr(again, name) == getattr(there, name)
    for name in ("model", "lora", "memory", "head"):
        assert_same(getattr(again, name), getattr(there, name))
    assert len(again.updates) == 3
    for one, other in zip(again.updates, there.updates, strict=True):
        assert_same(one, other)
    again.received["a/b"] = 99  # of its own
    assert checkpoint.table["received"]["a/b"] == 2
    # It may go back further than it knows, so no client may forget anything yet.
    assert {again.message(client).forget_before for client in ("a/b", "new")} == {-1}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["checkpoints/0003.json", "checkpoints/0003.safetensors", "updates/0001.safetensors"]
)
def test_a_damaged_file_of_a_checkpoint_is_named(tmp_path: Path, name: str, damage: str) -> None:
    checkpoints, _ = saved(tmp_path, 3)
    path = tmp_path / "checkpoints" / "0003.json"
    checkpoints.load(path, tmp_path / "updates")
    DAMAGES[damage](tmp_path / name)
    with pytest.raises(StateError) as caught:
        checkpoints.load(path, tmp_path / "updates")
    assert str(tmp_path / name) in str(caught.value)


def test_a_list_where_an_object_should_be_is_named_too(tmp_path: Path) -> None:
    checkpoints, _ = saved(tmp_path, 1)
    path = tmp_path / "checkpoints" / "0001.json"
    path.write_text("[]")
    with pytest.raises(StateError, match=r"0001\.json"):
        checkpoints.load(path, tmp_path / "updates")


@pytest.mark.slow
def test_any_changed_bit_of_a_checkpoint_or_client_state_is_detected(tmp_path: Path) -> None:
    """The case of the ``e`` in ``\\u00e9`` is excepted, because it does not change the content."""
    checkpoints, _ = saved(tmp_path, 1)
    states = StoredStates(tmp_path / "clients", "run")
    states.save("a", ClientState(uploads={1: products(0)}))
    path = tmp_path / "checkpoints" / "0001.json"
    whole, named, unnoticed = path.read_bytes(), 0, 0
    table = checkpoints.load(path, tmp_path / "updates")[0].table
    for bit in range(8 * len(whole)):
        path.write_bytes(flipped(whole, bit))
        try:
            assert checkpoints.load(path, tmp_path / "updates")[0].table == table
            unnoticed += 1
        except StateError as error:
            named += str(path) in str(error)
    assert named + unnoticed == 8 * len(whole)
    assert unnoticed == whole.count(b"\\u00e9")
    path = tmp_path / "clients" / "a" / "state.json"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        path.write_bytes(flipped(whole, bit))
        callback = Notes()
        assert states.load("a", callback) == ClientState()
        assert str(path) in callback.notes[0]


@settings(max_examples=30, deadline=None)
@given(best=st.lists(st.booleans(), min_size=1, max_size=8), keep=st.integers(1, 4))
def test_the_newest_checkpoints_and_the_best_one_are_kept(best: list[bool], keep: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints = Checkpoints(folder, CheckpointSettings(keep=keep))
        there = server()
        updates, best_round = StoredUpdates(folder / "updates"), 0
        for round, is_best in enumerate(best):
            there.round, there.accepted = round, {"a": round}
            best_round = round if is_best else best_round
            checkpoints.save(there, updates, {"best_round": best_round})
            newest = range(max(0, round + 1 - keep), round + 1)
            wanted = sorted({*newest, best_round})
            for ending in ("json", "safetensors"):
                assert [int(path.stem) for path in sorted(folder.glob(f"*.{ending}"))] == wanted
            assert [int(path.stem) for path in checkpoints.newest_first()] == wanted[::-1]
            # A client must not forget what the server of the oldest of them would ask for.
            assert there.oldest == {"a": newest[0]}


def test_the_newest_checkpoint_is_kept_beyond_four_digits(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointSettings(keep=2))
    updates = StoredUpdates(tmp_path / "updates")
    for round in (9_998, 9_999, 10_000, 10_001):
        checkpoints.save(server(round), updates, {"best_round": 9_998})
    assert [int(path.stem) for path in checkpoints.newest_first()] == [10_001, 10_000, 9_998]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_resumed_before_damaged_checkpoints_keeps_its_new_ones(tmp_path: Path, keep: int) -> None:
    checkpoints, _ = saved(tmp_path, 4, keep=keep, best=1)
    damaged = [path for path in checkpoints.newest_first() if int(path.stem) > 1]
    assert len(damaged) == keep
    for path in damaged:
        path.write_text("{}")
    checkpoint, tensors, updates = checkpoints.load(
        tmp_path / "checkpoints" / "0001.json", tmp_path / "updates"
    )
    again = server()
    restore(again, checkpoint, tensors, updates)
    advance(again, 10)
    checkpoints.save(again, updates, {"best_round": 1})
    checkpoints.load(tmp_path / "checkpoints" / "0002.json", tmp_path / "updates")


def test_a_checkpoint_without_its_json_file_is_ignored(tmp_path: Path) -> None:
    checkpoints, _ = saved(tmp_path, 2)
    (tmp_path / "checkpoints" / "0003.safetensors").write_bytes(b"half")
    assert [path.name for path in checkpoints.newest_first()] == ["0002.json", "0001.json"]


# --- no code in files


def test_nothing_in_the_package_unpickles_anything() -> None:
    """A checkpoint or a client's file may come from anywhere: reading it must not run it."""
    modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assume_safe = {"torch": {"load", "save"}, "np": {"load"}, "numpy": {"load"}, "pd": {"read_pickle"}}
    found: list[str] = []
    for path in sorted(Path(fedsmoothlora.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names = [f"{node.value.id}.{node.attr}"]
            elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
                names = [f"pickle.{node.arg}"]
            for name in names:
                module, _, rest = name.partition(".")
                if module in modules or rest in assume_safe.get(module, ()):
                    found.append(f"{path.name}: {name}")
    assert found == []


def test_what_is_stored_is_safetensors_and_json_only(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    StoredStates(tmp_path / "clients", "run").save("a", KEPT)
    for path in files_of(tmp_path):
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            data = data[8 : 8 + int.from_bytes(data[:8], "little")]
        else:
            assert path.suffix == ".json"
        assert isinstance(json.loads(data), dict)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(
            st.characters(exclude_categories=["Cs"], exclude_characters="/\x00"), min_size=1, max_size=12
        ),
        st.tuples(st.integers(0, 3), st.booleans()),
        max_size=5,
    )
)
def test_an_update_is_restored_from_its_flat_form(layers: dict[str, Any]) -> None:
    assume("__metadata__" not in layers)
    update = {
        name: LowRank(torch.ones(M, rank), torch.ones(rank, N)) if factored else torch.ones(rank)
        for name, (rank, factored) in layers.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        digest = write_tensors(path, flatten(update))
        assert_same(unflatten(read_tensors(path, digest)), update)
