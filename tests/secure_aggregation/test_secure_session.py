"""Sessions of a simulated coordinator and its sites: the sum, lost sites, lies, the coordinator's view."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare
from simulated_session import (
    STAGES,
    Simulated,
    a_round,
    a_session,
    registered_key,
    simulated,
)

from fedsmoothlora.errors import LyingSitesError, TooFewSitesError
from fedsmoothlora.secure_aggregation.agreement import new_private_key, public_key
from fedsmoothlora.secure_aggregation.identities import public_bytes
from fedsmoothlora.secure_aggregation.messages import (
    Advertisement,
    Confirmation,
    Masked,
    Revealed,
    Shares,
)
from fedsmoothlora.secure_aggregation.site import Advertised, signed_by


def plain_sum(run: Simulated) -> Any:
    return sum(run.numbers[client] for client in run.summed())


def exact_mean(run: Simulated, size: int) -> dict[str, Any]:
    tensors = a_round(run.session, size)
    summed, weights = run.summed(), [tensors[client][1] for client in run.summed()]
    return {n: np.average([tensors[c][0][n] for c in summed], axis=0, weights=weights) for n in ("B", "A")}


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize(("count", "threshold"), [(2, 2), (3, 2), (5, 4)])
def test_the_coordinator_learns_the_sum_and_so_the_mean(count: int, threshold: int, bits: int) -> None:
    run = simulated(a_session(count, threshold), size=6, bits=bits)
    found = run.run()
    assert np.array_equal(found.total, plain_sum(run))
    assert found.lying == {}
    assert run.refused == {}
    mean = found.mean
    assert found.summed == run.session.clients
    step = 1 / (run.code.limit * mean.weight)
    for name, exact in exact_mean(run, 6).items():
        # Half a step for the number of each client, and as much for its rounded weight.
        assert np.allclose(mean.tensors[name], exact, rtol=0, atol=count * run.code.bounds[name] * step * 2)


@pytest.mark.parametrize("stage", STAGES)
def test_a_site_that_is_lost_in_any_stage_does_not_stop_the_session(stage: str) -> None:
    run = simulated(a_session(4, 3), lost={"site-01": stage})
    found = run.run()
    assert np.array_equal(found.total, plain_sum(run))
    assert ("site-01" in run.summed()) == (stage in ("confirm", "reveal"))


def test_sites_that_are_lost_in_different_stages_do_not_stop_the_session() -> None:
    lost = {"site-00": "mask", "site-02": "share", "site-04": "reveal"}
    run = simulated(a_session(7, 4), lost=lost)
    assert np.array_equal(run.run().total, plain_sum(run))
    assert run.summed() == ["site-01", "site-03", "site-04", "site-05", "site-06"]


@pytest.mark.parametrize("stage", STAGES)
def test_with_fewer_sites_than_the_threshold_there_is_no_sum(stage: str) -> None:
    run = simulated(a_session(4, 3), lost={"site-01": stage, "site-03": stage})
    with pytest.raises(TooFewSitesError, match="the threshold is 3"):
        run.run()


def test_a_round_that_failed_is_repeated_in_a_new_session() -> None:
    failed = simulated(a_session(3, 2, attempt=0), lost={"site-00": "mask", "site-01": "mask"})
    with pytest.raises(TooFewSitesError):
        failed.run()
    repeated = simulated(a_session(3, 2, attempt=1))
    assert np.array_equal(repeated.run().total, plain_sum(repeated))
    # The site that had sent its masked numbers masks them anew.
    first, second = (run.received["mask", "site-02"].numbers for run in (failed, repeated))
    assert np.mean(first == second) < 0.1


# -- lies


def wrong_seed_share(message: Revealed) -> Revealed:
    share = message.seeds["site-00"]
    return replace(message, seeds={**message.seeds, "site-00": share[:-1] + bytes([share[-1] ^ 1])})


def wrong_key_share(message: Revealed) -> Revealed:
    return replace(message, mask_keys={owner: share[::-1] for owner, share in message.mask_keys.items()})


def no_shares(message: Revealed) -> Revealed:
    return Revealed(seeds={}, mask_keys={})


@pytest.mark.parametrize("lie", [wrong_seed_share, wrong_key_share, no_shares], ids=lambda lie: lie.__name__)
def test_a_site_that_reveals_wrong_shares_is_found_and_the_sum_is_right(lie: Any) -> None:
    run = simulated(a_session(5, 3), lost={"site-04": "mask"}, lies={("reveal", "site-02"): lie})
    found = run.run()
    assert list(found.lying) == ["site-02"]
    assert np.array_equal(found.total, plain_sum(run))


def test_too_many_wrong_shares_leave_no_sum_and_all_are_named() -> None:
    lies = {("reveal", f"site-0{index}"): wrong_seed_share for index in (1, 2)}
    run = simulated(a_session(3, 2), lies=lies)
    with pytest.raises(TooFewSitesError, match=r"1 of site-00; .*site-01: .*site-02: "):
        run.run()


@pytest.mark.parametrize(("secret", "lost"), [("seed", None), ("mask_key", "mask")])
def test_a_site_that_shares_another_secret_than_it_advertised_is_found(secret: str, lost: str | None) -> None:
    def deal(state: Advertised) -> Advertised:
        return replace(state, **{secret: new_private_key()[: len(getattr(state, secret))]})

    run = simulated(a_session(4, 3), deals={"site-01": deal}, lost={"site-01": lost} if lost else {})
    with pytest.raises(LyingSitesError, match="site-01") as raised:
        run.run()
    assert list(raised.value.sites) == ["site-01"]


def wrong_hashes(message: Shares) -> Shares:
    return replace(message, hashes={client: (bytes(32), bytes(32)) for client in message.hashes})


def wrong_ciphertexts(message: Shares) -> Shares:
    return replace(message, ciphertexts=dict.fromkeys(message.ciphertexts, b"no token"))


def swapped_ciphertexts(message: Shares) -> Shares:
    names = sorted(message.ciphertexts)
    swapped = zip(names, names[1:] + names[:1], strict=True)
    return replace(message, ciphertexts={name: message.ciphertexts[other] for name, other in swapped})


@pytest.mark.parametrize(
    "lie", [wrong_hashes, wrong_ciphertexts, swapped_ciphertexts], ids=lambda lie: lie.__name__
)
def test_shares_that_no_site_can_use_are_reported_by_all(lie: Any) -> None:
    run = simulated(a_session(4, 3), lies={("share", "site-03"): lie})
    with pytest.raises(TooFewSitesError, match="of site-03"):
        run.run()
    others = ("site-00", "site-01", "site-02")
    assert all("site-03" in run.received["mask", client].unusable for client in others)


def test_shares_that_one_site_cannot_use_do_not_stop_the_session() -> None:
    def lie(message: Shares) -> Shares:
        return replace(message, ciphertexts={**message.ciphertexts, "site-00": b"no token"})

    run = simulated(a_session(4, 3), lies={("share", "site-03"): lie})
    found = run.run()
    assert np.array_equal(found.total, plain_sum(run))
    assert found.lying == {}
    assert list(run.received["mask", "site-00"].unusable) == ["site-03"]


def unsigned(message: Advertisement) -> Advertisement:
    return replace(message, signature=b"")


def other_mask_key(message: Advertisement) -> Advertisement:
    return replace(message, mask_key=public_key(new_private_key()))


def of_another_round(message: Advertisement) -> Advertisement:
    return signed_by(registered_key("site-01"), a_session(4, 3, round=1), message)


def of_an_unregistered_key(message: Advertisement) -> Advertisement:
    key = registered_key("nobody")
    return signed_by(key, a_session(4, 3), replace(message, identity=public_bytes(key)))


def no_key(message: Advertisement) -> Advertisement:
    return replace(message, identity=b"nothing")


def no_point(message: Advertisement) -> Advertisement:
    """A registered site can sign anything."""
    return signed_by(registered_key("site-01"), a_session(4, 3), replace(message, cipher_key=b"\x02" * 49))


FORGED = [no_point, unsigned, other_mask_key, of_another_round, of_an_unregistered_key, no_key]


@pytest.mark.parametrize("lie", FORGED, ids=lambda lie: lie.__name__)
def test_keys_without_the_signature_of_a_registered_key_are_refused(lie: Any) -> None:
    run = simulated(a_session(4, 3), lies={("advertise", "site-01"): lie})
    assert np.array_equal(run.run().total, plain_sum(run))
    assert list(run.refused) == ["site-01"]


def short(message: Masked) -> Masked:
    return replace(message, numbers=message.numbers[:-1])


def of_another_size(message: Masked) -> Masked:
    return replace(message, numbers=message.numbers.astype(np.uint16))


def with_columns(message: Masked) -> Masked:
    return replace(message, numbers=message.numbers.reshape(-1, 2))


@pytest.mark.parametrize("lie", [short, of_another_size, with_columns], ids=lambda lie: lie.__name__)
def test_masked_numbers_of_another_form_are_refused(lie: Any) -> None:
    run = simulated(a_session(4, 3), lies={("mask", "site-02"): lie})
    assert np.array_equal(run.run().total, plain_sum(run))
    assert list(run.refused) == ["site-02"]


def test_shares_for_other_sites_than_those_of_the_roster_are_refused() -> None:
    def lie(message: Shares) -> Shares:
        return replace(message, ciphertexts={"site-00": b""})

    run = simulated(a_session(4, 3), lies={("share", "site-02"): lie})
    assert np.array_equal(run.run().total, plain_sum(run))
    assert list(run.refused) == ["site-02"]


def test_a_wrong_confirmation_is_refused() -> None:
    def lie(message: Confirmation) -> Confirmation:
        return Confirmation(signature=bytes(len(message.signature)))

    run = simulated(a_session(4, 3), lies={("confirm", "site-02"): lie})
    # It sent its masked numbers before, so they belong to the sum.
    assert np.array_equal(run.run().total, sum(run.numbers.values()))
    assert list(run.refused) == ["site-02"]


# -- what the coordinator sees


def all_values(value: Any) -> Iterator[Any]:
    """All bytes, texts and arrays of a message."""
    if is_dataclass(value):
        for part in fields(value):
            yield from all_values(getattr(value, part.name))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from all_values(key)
            yield from all_values(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from all_values(item)
    else:
        yield value


def test_the_coordinator_receives_no_numbers_but_masked_ones() -> None:
    run = simulated(a_session(4, 3), size=40, lost={"site-03": "confirm"})
    run.run()
    kinds: dict[str, set[type]] = {}
    for (stage, _), message in run.received.items():
        kinds.setdefault(stage, set()).update(type(value) for value in all_values(message))
    assert kinds == {
        "advertise": {str, bytes},
        "share": {str, bytes},
        "mask": {np.ndarray},
        "confirm": {bytes},
        "reveal": {str, bytes},
    }
    for client in run.session.clients:
        sent = b"".join(
            bytes(value) if isinstance(value, bytes) else np.asarray(value).tobytes()
            for (_, sender), message in run.received.items()
            if sender == client
            for value in all_values(message)
            if not isinstance(value, str)
        )
        plain = run.numbers[client]
        for start in range(0, len(plain) - 3, 4):  # no 16 bytes of the plain integers are in its messages
            assert plain[start : start + 4].tobytes() not in sent


@pytest.mark.parametrize("bits", [16, 32])
def test_masked_numbers_are_uniform_and_unrelated_to_the_plain_ones(bits: Any) -> None:
    run = simulated(a_session(3, 2), size=8192, bits=bits)
    for client in run.session.clients:
        plain = run.numbers[client]
        plain[: plain.size // 2] = 1  # as far from uniform as numbers can be
    run.run()
    for client in run.session.clients:
        masked = run.received["mask", client].numbers
        assert chisquare(np.bincount(np.frombuffer(masked.tobytes(), np.uint8), minlength=256)).pvalue > 1e-6
        unmasked = masked - run.numbers[client]  # the mask alone is uniform too
        assert chisquare(np.bincount(unmasked >> (bits - 8), minlength=256)).pvalue > 1e-6
        for other in run.session.clients:
            if other != client:  # masks of two sites do not cancel
                both = masked + run.received["mask", other].numbers
                assert chisquare(np.bincount(both >> (bits - 8), minlength=256)).pvalue > 1e-6


def test_all_sums_of_fewer_sites_remain_masked() -> None:
    run = simulated(a_session(3, 2), size=64)
    run.run()
    everything = {client: run.received["mask", client].numbers for client in run.session.clients}
    for left_out in run.session.clients:
        rest = [client for client in run.session.clients if client != left_out]
        masked = sum(everything[client] for client in rest)
        plain = sum(run.numbers[client] for client in rest)
        assert np.mean(masked == plain) < 0.05
