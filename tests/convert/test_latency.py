"""The latency harness: exact on an invented clock, honest on a noisy one."""

from collections.abc import Callable, Iterator
from itertools import cycle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.errors import TightfitError
from convert.latency import BLOCKS, MIN_HALF_WIDTH, measure, ratio_interval, summary
from convert.report.schema import Latency


class FakeClock:
    """A clock that only moves when a model made by `model` is called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def model(self, durations: Iterator[float], name: str = "") -> Callable[[], None]:
        def run() -> None:
            self.now += next(durations)
            self.calls.append(name)

        return run


def timed(ours: list[float], theirs: list[float] | None, **options: float) -> Latency:
    """Measure models that take these seconds, over and over."""
    clock = FakeClock()
    twin = None if theirs is None else clock.model(cycle(theirs), "float")
    limits = {"min_runs": 100, "min_seconds": 0.0, "warmup_seconds": 0.0, **options}
    return measure(clock.model(cycle(ours), "int8"), twin, threads=1, clock=clock, **limits)  # type: ignore[arg-type]


def test_a_model_of_constant_speed_has_that_speed_in_every_percentile() -> None:
    latency = timed([0.004], [0.008])
    assert (latency.p50_ms, latency.p90_ms, latency.p99_ms) == pytest.approx((4, 4, 4))
    assert latency.float_p50_ms == pytest.approx(8)
    assert latency.speedup == pytest.approx(2)
    assert latency.ratio_interval == pytest.approx((2 * (1 - MIN_HALF_WIDTH), 2 * (1 + MIN_HALF_WIDTH)))
    assert latency.cv == pytest.approx(0, abs=1e-9)
    assert latency.stable
    assert latency.warnings == ()


def test_percentiles_count_every_timed_call_and_drop_no_outlier() -> None:
    # One warm-up call; then six calls per block, of which the first (500 ms) is untimed and the last takes 101 ms.
    latency = timed([0.101, 0.5, 0.001, 0.001, 0.001, 0.001], None)
    assert latency.runs == 100
    expected = np.percentile([1.0] * 80 + [101.0] * 20, [50, 90, 99])
    assert (latency.p50_ms, latency.p90_ms, latency.p99_ms) == pytest.approx(tuple(expected))
    # mean 21, deviation 40
    assert latency.cv == pytest.approx(40 / 21)


def test_a_slower_artifact_has_a_speedup_below_one_and_a_warning() -> None:
    latency = timed([0.010], [0.008])
    assert latency.speedup == pytest.approx(0.8)
    assert any("slower than float" in warning for warning in latency.warnings)
    assert latency.stable  # slow is not the same as unstable


def test_a_noisy_clock_is_marked_unstable() -> None:
    noise = np.random.default_rng(1).lognormal(0, 1.5, 120) * 1e-3
    latency = timed(list(noise), [0.002])
    assert not latency.stable
    assert any("unstable timing" in warning for warning in latency.warnings)


def test_a_machine_that_slows_down_half_way_is_marked_unstable_yet_the_ratio_holds() -> None:
    clock = FakeClock()

    def slowing(fast: float) -> Iterator[float]:
        while True:
            yield fast if len(clock.calls) < 120 else 3 * fast

    latency = measure(
        clock.model(slowing(0.001)),
        clock.model(slowing(0.002)),
        min_runs=100,
        min_seconds=0,
        warmup_seconds=0,
        threads=1,
        clock=clock,
    )
    assert not latency.stable
    assert latency.ratio_interval is not None
    low, high = latency.ratio_interval
    assert low <= 2 <= high


def test_blocks_alternate_their_order_so_that_drift_cancels() -> None:
    clock = FakeClock()
    ours, theirs = clock.model(cycle([0.001]), "q"), clock.model(cycle([0.001]), "f")
    measure(ours, theirs, min_runs=BLOCKS, min_seconds=0, warmup_seconds=0, threads=1, clock=clock)
    assert "".join(clock.calls[:2]) == "qf"  # warm-up
    # One untimed and one timed call per block.
    assert "".join(clock.calls[2:]) == "qqffffqq" * (BLOCKS // 2)


def test_a_steady_slowdown_shared_by_both_leaves_no_trace_in_the_ratio() -> None:
    clock = FakeClock()

    def drifting() -> Iterator[float]:
        while True:
            yield 0.001 * (1 + len(clock.calls) / 10_000)

    latency = measure(
        clock.model(drifting()),
        clock.model(drifting()),
        min_runs=100,
        min_seconds=0,
        warmup_seconds=0,
        threads=1,
        clock=clock,
    )
    assert latency.speedup == pytest.approx(1, abs=1e-3)  # half a block of drift is 3e-4


def test_short_calls_are_repeated_until_the_seconds_are_full() -> None:
    latency = timed([0.001], [0.002], min_runs=20, min_seconds=1.0)
    assert latency.runs == pytest.approx(1000, abs=BLOCKS)  # a block may end one call late by rounding
    assert latency.float_runs == pytest.approx(500, abs=BLOCKS)


def test_without_a_float_twin_there_is_no_speedup() -> None:
    latency = timed([0.001], None)
    assert latency.speedup is None
    assert latency.float_p50_ms is None
    assert latency.ratio_interval is None
    assert latency.stable


def test_a_float_twin_that_took_a_block_of_outliers_is_not_called_stable() -> None:
    clock = FakeClock()
    slow_start = [0.001] + [0.001] * 6 * 15 + [0.01] * 6 * 5
    twin = clock.model(cycle(slow_start))
    ours = clock.model(cycle([0.001]))
    latency = measure(ours, twin, min_runs=100, min_seconds=0, warmup_seconds=0, threads=1, clock=clock)
    assert any("float" in warning for warning in latency.warnings)
    assert not latency.stable


def test_a_clock_that_stands_still_is_an_error_not_an_endless_loop() -> None:
    with pytest.raises(TightfitError, match="no time"):
        timed([0.0], None, min_seconds=1.0, warmup_seconds=1.0)
    with pytest.raises(TightfitError, match="too fast"):
        timed([0.0], None)


@pytest.mark.parametrize("bad", [{"min_runs": 0}, {"min_seconds": -1.0}, {"warmup_seconds": -1.0}])
def test_limits_that_measure_nothing_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(TightfitError, match="cannot time"):
        timed([0.001], None, **bad)


def test_progress_ends_at_one() -> None:
    clock, seen = FakeClock(), []
    run = clock.model(cycle([0.001]))
    measure(run, None, min_runs=20, min_seconds=0, warmup_seconds=0, threads=1, clock=clock, progress=seen.append)
    assert seen[-1] == 1
    assert seen == sorted(seen)


def test_an_error_of_the_model_is_not_swallowed() -> None:
    def broken() -> None:
        raise RuntimeError("kernel refused")

    with pytest.raises(RuntimeError, match="kernel refused"):
        measure(broken, None, threads=1)


def test_the_real_clock_tells_a_heavier_call_from_a_lighter_one() -> None:
    light, heavy = np.ones((32, 32)), np.ones((192, 192))
    latency = measure(
        lambda: heavy @ heavy,
        lambda: light @ light,
        min_runs=40,
        min_seconds=0.02,
        warmup_seconds=0.01,
        threads=1,
    )
    assert latency.speedup is not None
    assert latency.speedup < 1  # 216 times the arithmetic
    assert latency.cpu


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(1e-4, 1e-2), min_size=4, max_size=8), st.floats(0.1, 10))
def test_the_interval_contains_the_true_ratio_when_both_suffer_alike(speeds: list[float], ratio: float) -> None:
    blocks = [np.full(5, s) for s in speeds]
    low, high = ratio_interval(blocks, [b * ratio for b in blocks])
    assert low <= ratio * (1 + 1e-9)
    assert high >= ratio * (1 - 1e-9)


def test_thinning_long_blocks_keeps_the_interval() -> None:
    generator = np.random.default_rng(2)
    blocks = [generator.gamma(20, 1e-4, 3000) for _ in range(10)]
    slow = [b * 1.5 for b in blocks]
    low, high = ratio_interval(blocks, slow)
    # Medians of 30,000 values: the interval is as narrow as the blocks are alike, which is as narrow as it gets.
    assert (low, high) == pytest.approx((1.5 * (1 - MIN_HALF_WIDTH), 1.5 * (1 + MIN_HALF_WIDTH)), rel=0.001)


def test_a_disturbance_of_a_quarter_of_the_rounds_widens_the_interval_to_hold_it() -> None:
    blocks = [np.full(5, 0.001) for _ in range(BLOCKS)]
    float_blocks = [np.full(5, 0.002 if i < BLOCKS * 3 // 4 else 0.003) for i in range(BLOCKS)]
    low, high = ratio_interval(blocks, float_blocks)
    assert (low, high) == pytest.approx((2 * (1 - MIN_HALF_WIDTH), 3))


def test_a_machine_that_others_keep_busy_is_marked_unstable() -> None:
    blocks = [np.full(5, 0.001) for _ in range(BLOCKS)]
    facts = {"threads": 1, "where": "local", "cpu": "any", "governor": None}
    assert summary(blocks, blocks, **facts, others=None).stable  # type: ignore[arg-type]
    assert summary(blocks, blocks, **facts, others=0.05).stable  # type: ignore[arg-type]
    busy = summary(blocks, blocks, **facts, others=0.4)  # type: ignore[arg-type]
    assert not busy.stable
    assert any("other processes took 40% of the cores" in text for text in busy.warnings)


def test_a_summary_holds_all_percentiles_and_the_times_of_loading() -> None:
    blocks = [np.linspace(0.001, 0.002, 101)]
    latency = summary(
        blocks, None, threads=1, where="local", cpu="any", governor="ondemand", load_ms=12.5, first_ms=3.5
    )
    assert latency.quantiles_ms == pytest.approx(np.linspace(1, 2, 101))
    assert latency.quantiles_ms[50] == latency.p50_ms
    assert latency.float_quantiles_ms == ()
    assert (latency.load_ms, latency.first_ms, latency.governor) == (12.5, 3.5, "ondemand")
