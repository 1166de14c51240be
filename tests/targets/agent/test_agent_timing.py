"""The loop that times calls: its order, its limits, and what it is told."""

from collections.abc import Callable

import pytest

from targets.agent.timing import ROUNDS, TimingError, block_of, in_rounds


class Clock:
    """Moves when a call made by `call` is made."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, ""

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds
            self.calls += name

        return run


def test_contestants_take_turns_in_alternating_order_after_both_are_warm() -> None:
    clock = Clock()
    blocks = [block_of(clock.call(name, 0.5), clock) for name in "ab"]
    told: list[int] = []
    times = in_rounds(blocks, min_runs=ROUNDS, min_seconds=0, warmup_seconds=0, between=told.append)
    assert clock.calls == "ab" + "aabbbbaa" * (ROUNDS // 2)  # in each block one untimed, one timed
    assert times == [[[0.5]] * ROUNDS] * 2
    assert told == list(range(1, ROUNDS + 1))


def test_the_longer_of_runs_and_seconds_counts() -> None:
    clock = Clock()
    by_runs = in_rounds([block_of(clock.call("a", 0.5), clock)], min_runs=100, min_seconds=1, warmup_seconds=0)
    assert sum(len(block) for block in by_runs[0]) == 100
    by_seconds = in_rounds([block_of(clock.call("a", 0.5), clock)], min_runs=ROUNDS, min_seconds=80, warmup_seconds=0)
    assert sum(len(block) for block in by_seconds[0]) == 160


def test_what_happens_between_rounds_is_not_timed() -> None:
    clock = Clock()

    def slow(_: int) -> None:
        clock.now += 100

    times = in_rounds(
        [block_of(clock.call("a", 0.5), clock)], min_runs=ROUNDS, min_seconds=0, warmup_seconds=0, between=slow
    )
    assert times[0] == [[0.5]] * ROUNDS


@pytest.mark.parametrize(
    "bad", [{"min_runs": ROUNDS - 1}, {"min_seconds": -1.0}, {"warmup_seconds": -1.0}, {"min_seconds": float("nan")}]
)
def test_limits_that_measure_nothing_are_refused(bad: dict[str, float]) -> None:
    limits = {"min_runs": ROUNDS, "min_seconds": 0.0, "warmup_seconds": 0.0, **bad}
    with pytest.raises(TimingError, match="cannot time"):
        in_rounds([], **limits)  # type: ignore[arg-type]


def test_a_clock_that_stands_still_is_an_error() -> None:
    with pytest.raises(TimingError, match="took no time"):
        block_of(lambda: None, lambda: 0.0)(1, 1.0)
