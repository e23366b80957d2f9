"""A rank that dies, or does not answer, is an error on all others, and in time."""

from __future__ import annotations

import re
import signal
import time

import pytest

from luxtorch.distributed import DistributedError
from luxtorch.distributed._world import collective

from .work import dying
from .world import start

TIMEOUT = 2.0
WAYS = ("averaged vector", "rule, dict", "sharded vector", "scattered", "sharded layers")
QUICK = [(2, "killed", "averaged vector"), (4, "killed", "sharded vector"), (2, "late", "averaged vector")]


def check(ranks, how, way, folder):
    processes = start(dying, ranks, folder, way, how, timeout=TIMEOUT)
    *others, last = processes
    end = time.monotonic() + 60
    for process in others:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in others]
    last.join(10 if how == "killed" else 0)
    killed = last.exitcode
    for process in processes:
        process.kill()
        process.join()
    assert codes == [7] * (ranks - 1)  # all have reported an error of luxtorch, and none has hung
    assert how == "late" or killed == -signal.SIGKILL
    reports = [(folder / f"report_{rank}").read_text() for rank in range(ranks - 1)]
    for report in reports:
        took = float(re.match(r"DistributedError after ([\d.]+) s", report)[1])
        assert took < TIMEOUT + 3  # some of it for a machine with much else to do
        assert how == "killed" or took > 0.9 * TIMEOUT
        assert "of all ranks failed" in report and "Restart from a checkpoint" in report
    # Of several that wait, the first one to give up ends the wait of the others.
    assert how == "killed" or any("Timed out" in report for report in reports)


@pytest.mark.parametrize(("ranks", "how", "way"), QUICK)
def test_a_rank_that_stops_stops_the_others(ranks, how, way, tmp_path):
    check(ranks, how, way, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("how", ["killed", "late"])
@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_stops_stops_the_others_in_every_way(ranks, how, way, tmp_path):
    check(ranks, how, way, tmp_path)


def test_an_error_of_the_transport_is_told_without_its_place_in_the_source():
    with (
        pytest.raises(DistributedError, match="The all-reduce of all ranks failed") as caught,
        collective("all-reduce"),
    ):
        raise RuntimeError("[/somewhere/pair.cc:545] Connection closed by peer [127.0.0.1]:16813. Good luck!\nstack")
    assert caught.value.got == "RuntimeError: Connection closed by peer [127.0.0.1]:16813"
    assert "time-out" in caught.value.fix and isinstance(caught.value.__cause__, RuntimeError)


def test_an_error_of_luxtorch_passes_as_it_is():
    own = DistributedError("Something else.")
    with pytest.raises(DistributedError) as caught, collective("step"):
        raise own
    assert caught.value is own
