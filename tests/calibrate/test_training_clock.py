"""The schedule of a training: counted in steps, and shortened only where the time is."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.training_clock import Clock


def through(clock: Clock, pause: float = 0.0) -> list[float]:
    """Where each step stood in the schedule."""
    found = []
    while clock.done < 1:
        found.append(clock.done)
        time.sleep(pause)
        clock.tick()
    return found


@given(st.integers(0, 300))
def test_with_time_enough_a_step_stands_where_its_number_says(steps: int) -> None:
    clock = Clock(steps, 1e9)
    assert through(clock) == [k / steps for k in range(steps)]
    assert (clock.taken, clock.stopped, clock.note()) == (steps, False, "")


def test_when_time_runs_short_the_schedule_still_comes_to_its_end_and_the_note_says_where() -> None:
    clock = Clock(1000, 0.2)
    found = through(clock, pause=0.01)  # 20 steps and a few
    assert 1 <= clock.taken < 100
    assert clock.stopped
    assert clock.note() == f", stopped by time_limit_s after {clock.taken} of 1000 steps: another run may differ"
    assert found == sorted(found)
    assert found[-1] > 0.5  # without a change of pace it would have stood at 2 %


def test_a_limit_of_nothing_allows_one_step() -> None:
    clock = Clock(5, 0.0)
    assert through(clock) == [0.0]
    assert clock.stopped


def test_steps_can_be_left_out() -> None:
    clock = Clock(10, 1e9)
    clock.tick()
    clock.skip_to(0.5)
    assert through(clock) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    clock.skip_to(0.2)  # never back
    assert clock.done == 1
