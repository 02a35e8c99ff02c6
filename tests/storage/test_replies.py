"""Stored replies of the round in progress are read back unchanged, or not at all."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsmoothlora.algebra.coding import Packed, code_factor, coded_product
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.federation.messages import Reply
from fedsmoothlora.federation.simulation import ClientReply
from fedsmoothlora.storage.replies import StoredReplies


def answer(
    client: str = "a", *, round: int = 2, attempt: int = 0, seed: int = 0, bits: int | None = None
) -> ClientReply:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    sent: dict[str, LowRank | torch.Tensor | Packed] = {
        "q": LowRank(draw(5, 2), draw(2, 3)),
        "w": draw(4, dtype=torch.bfloat16),
    }
    if bits is not None:
        sent["q"] = coded_product(LowRank(draw(5, 2), draw(2, 3)), bits)
        sent["k.lora_B"] = code_factor(draw(5, 2), "B", bits)
    reply = Reply(
        client=client,
        experiment="run",
        round=round,
        attempt=attempt,
        samples=7,
        sent=sent,
        head={"head.weight": draw(2, 3)},
        control={"q.lora_A": draw(2)},
        metrics={"train_loss": 0.1 + seed, "steps": 3},
    )
    return ClientReply(client=client, reply=reply, start={"q": LowRank(draw(5, 2), draw(2, 3))})


def assert_same(one: ClientReply, other: ClientReply) -> None:
    for name in ("client", "experiment", "round", "attempt", "samples", "metrics"):
        assert getattr(one.reply, name) == getattr(other.reply, name)
    assert one.client == other.client
    parts = [(getattr(one.reply, p), getattr(other.reply, p)) for p in ("sent", "head", "control")]
    for left, right in [*parts, (one.start, other.start)]:
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert type(value) is type(right[name])
            mine, theirs = tensors_of(value), tensors_of(right[name])
            assert [tensor.dtype for tensor in mine] == [tensor.dtype for tensor in theirs]
            assert all(map(torch.equal, mine, theirs))
            if isinstance(value, Packed):
                form = ("shape", "bits", "part")
                assert [getattr(value, key) for key in form] == [getattr(right[name], key) for key in form]


def tensors_of(value: LowRank | torch.Tensor | Packed) -> list[torch.Tensor]:
    if isinstance(value, LowRank):
        return [value.B, value.A]
    return [value.codes, value.scales] if isinstance(value, Packed) else [value]


def unnoted(text: str) -> None:
    raise AssertionError(text)


@settings(max_examples=25, deadline=None)
@given(
    clients=st.lists(st.text(max_size=150), unique=True, max_size=4),
    round=st.integers(0, 10**6),
    attempt=st.integers(0, 3),
    bits=st.sampled_from([None, 3, 4, 8]),
)
def test_a_reply_is_read_back_bit_for_bit(
    clients: list[str], round: int, attempt: int, bits: int | None
) -> None:
    with tempfile.TemporaryDirectory() as name:
        kept = {
            client: answer(client, round=round, attempt=attempt, seed=seed, bits=bits)
            for seed, client in enumerate(clients)
        }
        replies = StoredReplies(Path(name) / "replies", "run")
        for one in kept.values():
            replies.keep(one)
        found = StoredReplies(Path(name) / "replies", "run").load(round, attempt, unnoted)
        assert found.keys() == kept.keys()
        for client, one in kept.items():
            assert_same(found[client], one)


def test_replies_of_other_rounds_attempts_and_runs_are_not_used(tmp_path: Path) -> None:
    replies = StoredReplies(tmp_path / "replies", "run")
    replies.keep(answer("now"))
    replies.keep(answer("before", round=1))
    replies.keep(answer("again", attempt=1))
    assert set(replies.load(2, 0, unnoted)) == {"now"}
    assert set(replies.load(2, 1, unnoted)) == {"again"}
    assert StoredReplies(tmp_path / "replies", "another").load(2, 0, unnoted) == {}


@pytest.mark.parametrize("where", [0.01, 0.3, 0.99])
@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_reply_is_noted_and_not_used(tmp_path: Path, where: float, cut: bool) -> None:
    replies = StoredReplies(tmp_path, "run")
    replies.keep(answer("a"))
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    place = int(where * len(data))
    if cut:
        del data[place:]
    else:
        data[place] ^= 4
    file.write_bytes(data)
    notes: list[str] = []
    assert replies.load(2, 0, notes.append) == {}
    assert len(notes) == 1
    assert str(file) in notes[0]


def test_the_folder_exists_only_while_there_are_replies(tmp_path: Path) -> None:
    replies = StoredReplies(tmp_path / "replies", "run")
    replies.clear()
    assert replies.load(2, 0, unnoted) == {}
    assert not (tmp_path / "replies").exists()
    replies.keep(answer())
    replies.clear()
    assert not (tmp_path / "replies").exists()
