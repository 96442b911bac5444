"""Teams run a function in every thread, meet at barriers, and do not hang when a part fails."""

from __future__ import annotations

import time

import numpy as np
import pytest

from hemacrypt.engines.vector.kernels.barrier import BrokenTeamError, Team


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_part_runs_once_each_time(threads: int) -> None:
    team = Team(threads)
    for _ in range(50):
        seen = np.zeros(threads, dtype=np.int64)

        def count(part: int, seen: np.ndarray = seen) -> None:
            seen[part] += 1

        team.run(count)
        assert seen.tolist() == [1] * threads


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_nobody_passes_a_barrier_before_all_have_come(threads: int) -> None:
    team, rounds = Team(threads), 200
    place = np.zeros(threads, dtype=np.int64)
    early: list[int] = []

    def march(part: int) -> None:
        for number in range(1, rounds + 1):
            place[part] = number
            team.barrier()
            early.extend([number] * int((place < number).sum()))
            team.barrier()

    team.run(march)
    assert not early
    assert place.tolist() == [rounds] * threads


@pytest.mark.parametrize("guilty", [0, 1, 2])
def test_a_part_that_fails_stops_the_others_at_their_barrier(guilty: int) -> None:
    team = Team(3)
    ends: list[type[BaseException]] = []

    def work(part: int) -> None:
        team.barrier()
        if part == guilty:
            time.sleep(0.01)
            raise KeyError("mine")
        try:
            team.barrier()
        except BrokenTeamError as error:
            ends.append(type(error))
            raise

    for _ in range(3):
        with pytest.raises(KeyError, match="mine"):
            team.run(work)
    assert ends == [BrokenTeamError] * 6
    arrived: list[int] = []

    def meet(part: int) -> None:
        team.barrier()
        arrived.append(part)

    team.run(meet)
    assert sorted(arrived) == [0, 1, 2]


def test_a_failure_alone_is_raised_by_a_team_of_one() -> None:
    def fail(part: int) -> None:
        raise KeyError(part)

    with pytest.raises(KeyError):
        Team(1).run(fail)


def test_a_team_needs_somebody() -> None:
    with pytest.raises(ValueError, match="0 threads"):
        Team(0)
