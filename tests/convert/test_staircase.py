"""What blocks cost with fewer tokens: estimates from stairs, and stairs from times that are handed in, not measured."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from calibrate.tokens.schedule import Schedule
from convert import staircase
from convert.staircase import MLP, Staircase, counted, measured

TWELVE = Staircase((50, 100, 200), (0.6, 0.4, 0.0), 24.0, 0.1)


def test_the_whole_model_costs_what_it_took() -> None:
    assert TWELVE.ms(Schedule(12, 200)) == 24.0


def test_a_cut_saves_the_mlp_of_its_block_and_all_of_those_behind() -> None:
    cost = TWELVE.ms(Schedule(12, 200, ((9, 100),)))
    assert cost == pytest.approx(24.0 - 0.4 * (2 + MLP) + 0.1)
    # selection works on pairs of tokens: of half of them it costs a quarter
    two = TWELVE.ms(Schedule(12, 200, ((9, 100), (11, 50))))
    assert two == pytest.approx(cost - (0.6 - 0.4) * MLP + 0.1 / 4)


def test_between_stairs_times_are_interpolated_and_below_them_level() -> None:
    def at(keep: int) -> float:
        return TWELVE.ms(Schedule(12, 200, ((0, keep),)))

    assert at(75) == pytest.approx((at(50) + at(100)) / 2)
    assert at(20) == at(50)
    assert at(50) < at(100) < at(150) < at(199)


def test_a_cut_that_saves_less_than_choosing_costs_is_dearer_than_none() -> None:
    dear = Staircase((100, 200), (0.1, 0.0), 24.0, 0.5)
    assert dear.ms(Schedule(12, 200, ((11, 100),))) > dear.ms(Schedule(12, 200))


def test_stairs_are_said_in_words() -> None:
    assert "saves 0.6 ms with 50, 0.4 ms with 100 tokens of 200" in TWELVE.said()
    assert "choosing tokens once costs 0.1 ms; the whole model takes 24 ms" in TWELVE.said()
    assert "saves no time with fewer tokens" in Staircase((100, 200), (0.0, 0.0), 24.0, 0.1).said()


def test_work_is_counted_where_no_time_is_measured() -> None:
    assert counted(Schedule(4, 10)) == pytest.approx(1.0)
    half = counted(Schedule(4, 10, ((0, 5),)))
    assert half == pytest.approx((1 / 3 + 2 / 3 * 0.5 + 3 * 0.5) / 4)
    assert half < counted(Schedule(4, 10, ((1, 5),))) < counted(Schedule(4, 10, ((1, 6),))) < 1


def stairs(monkeypatch: pytest.MonkeyPatch, folder: Path, time: Callable[[str], float], tokens: int = 100) -> Staircase:
    """Stairs of 10 blocks on a machine where the artifact called `name` takes `time(name)` ms, twice as long each time
    that it is asked: so drifts a machine that grows hot."""
    heat = [1.0]

    def run(name: str, beside: str, **options: object) -> object:
        heat[0] *= 2
        return SimpleNamespace(p50_ms=heat[0] * time(name), float_p50_ms=heat[0] * time(beside))

    monkeypatch.setattr(staircase, "measure", run)
    return measured(
        10, tokens, 1, lambda keep: f"fixed {keep}", lambda keep: f"chosen {keep}", lambda graph, path: graph,
        lambda session: session, folder, ".onnx", lambda done, total: None,
    )  # type: ignore[arg-type, return-value]  # fmt: skip


def test_stairs_come_from_ratios_so_that_a_machine_may_slow_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def time(name: str) -> float:
        """1 ms for each block's worth of tokens, of which the first block's attention has all; 0.5 ms to choose."""
        kind, keep = name.split()
        return (1 / 3 + (9 + MLP) * int(keep) / 100) + (0.5 if kind == "chosen" else 0.0)

    found = stairs(monkeypatch, tmp_path, time)
    assert found.tokens[-1] == 100
    assert len(found.tokens) == 4
    for count, saved in zip(found.tokens, found.saved, strict=True):
        assert saved / found.full == pytest.approx((1 - count / 100) / 10)
    assert found.selection / found.full == pytest.approx(0.5 / 10)
    assert found.ms(Schedule(10, 100)) == found.full


def test_what_is_no_faster_with_fewer_tokens_saves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = stairs(monkeypatch, tmp_path, lambda name: 1.0 if name == "fixed 100" else 1.1)
    assert set(found.saved) == {0.0}
    assert found.selection == 0.0
    assert "no time" in found.said()


def test_models_of_few_tokens_have_stairs_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = stairs(monkeypatch, tmp_path, lambda name: int(name.split()[1]), tokens=6)
    assert found.tokens[-1] == 6
    assert min(found.tokens) >= 3  # the class token and two more: one of them may be a fused rest
    assert list(found.tokens) == sorted(set(found.tokens))
    assert list(found.saved) == sorted(found.saved, reverse=True)
