"""A transcript that was written and read gives the same sum, also with a lost site."""

import pytest

pytest.importorskip("flwr")
from simulated_session import Simulated, a_session, fingerprints, simulated

from fedsmoothlora.errors import WireError
from fedsmoothlora.secure_aggregation.session import Transcript, collect, unmasked
from fedsmoothlora.secure_aggregation.transcripts import dumped_transcript, loaded_transcript


def a_transcript() -> tuple[Simulated, Transcript]:
    sites = simulated(a_session(4, 3), lost={"site-02": "mask"})
    return sites, collect(sites.session, fingerprints(sites.session), sites.code, sites)


def test_it_gives_the_same_sum_as_often_as_it_is_read() -> None:
    sites, transcript = a_transcript()
    data = dumped_transcript(transcript)
    right = sum(sites.numbers[client].astype("<u4") for client in transcript.masked)
    states = dict(sites._states)
    for _ in range(2):
        sites._states = dict(states)  # a site's answer does not change its state
        found = unmasked(loaded_transcript(data, sites.code), sites.code, sites)
        assert (found.total == right).all()
        assert found.summed == ("site-00", "site-01", "site-03")


def test_other_bytes_are_refused() -> None:
    sites, transcript = a_transcript()
    data = dumped_transcript(transcript)
    for wrong in (b"", data[:-4], data + bytes(4), data[:200], bytes(100)):
        with pytest.raises(WireError):
            loaded_transcript(wrong, sites.code)
