"""What boards say of themselves, on trees of files as kernels lay them out; not run on hardware."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from targets.agent import affinity
from targets.agent.board import Board
from targets.agent.power import Meter, rails_watts
from targets.agent.timing import block_of
from targets.agent.watch import Watch

CORE = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
# Some of the lines that a Raspberry Pi 5 prints; EXT5V has no current.
PMIC = """ 3V7_WL_SW_A current(0)=0.10000000A
  VDD_CORE_A current(7)=2.00000000A
 3V7_WL_SW_V volt(8)=3.70000000V
  VDD_CORE_V volt(15)=0.80000000V
     EXT5V_V volt(24)=5.10000000V
"""


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


@pytest.fixture
def pi(tmp_path: Path) -> Path:
    cpu = f"sys/devices/system/cpu/cpu{CORE}/cpufreq"
    return write(
        tmp_path / "root",
        {
            "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
            "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"',
            f"{cpu}/scaling_cur_freq": 2400000,
            f"{cpu}/scaling_governor": "ondemand",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
            "sys/class/thermal/thermal_zone0/temp": 61234,
            "sys/class/thermal/thermal_zone1/type": "battery",
            "sys/class/thermal/thermal_zone1/temp": 90000,
        },
    )


@pytest.fixture
def vcgencmd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a tool of that name into PATH, and sets the word that it says."""
    tool, word = tmp_path / "bin" / "vcgencmd", tmp_path / "word"
    tool.parent.mkdir()
    pmic = tmp_path / "pmic"
    pmic.write_text(PMIC)
    tool.write_text(f'#!/bin/sh\ncase $1 in get_throttled) echo "throttled=$(cat {word})";; *) cat {pmic};; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")

    def say(value: str) -> None:
        word.write_text(value)

    say("0x0")
    return say


def test_a_board_says_its_name_clock_temperature_and_governor(pi: Path) -> None:
    board = Board(pi)
    state = board.state("before", 0.0)
    assert (state["clock_mhz"], state["temperature_c"], state["governor"]) == (2400, 61.234, "ondemand")
    assert board.facts()["machine"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert board.facts()["system"] == "Debian GNU/Linux 12 (bookworm)"


def test_a_board_that_says_nothing_has_nulls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    state = Board(tmp_path).state("before", 0.0)
    assert {name for name, value in state.items() if value is not None} == {"moment", "minute"}


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("0x0", []),
        ("0x1", ["under-voltage"]),
        ("0x6", ["clock capped", "throttled"]),
        ("0xf0000", []),
        ("0x50008", ["soft temperature limit"]),
    ],
)
def test_the_bits_of_now_are_told_apart_from_those_since_the_start(
    pi: Path, vcgencmd: Callable[[str], None], word: str, words: list[str]
) -> None:
    vcgencmd(word)
    assert Board(pi).slowed() == words


class Hours:
    """A clock that goes on by ten seconds whenever it is looked at."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 10
        return self.now


def watched(pi: Path, say: Callable[[str], None], before: str, during: str, after: str) -> Watch:
    say(before)
    watch = Watch(Board(pi), Hours())
    say(during)
    watch.during()
    say(after)
    watch.after()
    return watch


def test_a_quiet_board_voids_nothing(pi: Path, vcgencmd: Callable[[str], None]) -> None:
    watch = watched(pi, vcgencmd, "0x0", "0x0", "0x0")
    assert watch.void is None
    assert [state["moment"] for state in watch.states] == ["before", "during", "after"]


@pytest.mark.parametrize(
    ("before", "during", "after", "why"),
    [
        ("0x4", "0x0", "0x0", "before the timing (throttled)"),
        ("0x0", "0x2", "0x20000", "during the timing (clock capped)"),
        ("0x0", "0x0", "0x8", "after the timing (soft temperature limit)"),
        ("0x0", "0x0", "0x10000", "during the timing (under-voltage)"),
        ("0x10000", "0x10000", "0x50000", "during the timing (throttled)"),
    ],
)
def test_throttling_at_any_time_voids_the_timing(
    pi: Path, vcgencmd: Callable[[str], None], before: str, during: str, after: str, why: str
) -> None:
    assert watched(pi, vcgencmd, before, during, after).void == f"the processor was slowed down {why}"


def test_throttling_long_before_is_a_warning_and_voids_nothing(pi: Path, vcgencmd: Callable[[str], None]) -> None:
    watch = watched(pi, vcgencmd, "0x50000", "0x50000", "0x50000")
    assert watch.void is None
    assert any("under-voltage, throttled" in text for text in watch.warnings())


def test_the_kernel_cooling_by_clocks_voids_the_timing_and_a_fan_does_not(
    pi: Path, vcgencmd: Callable[[str], None]
) -> None:
    cooler = "sys/class/thermal/cooling_device0"
    write(pi, {f"{cooler}/type": "pwm-fan", f"{cooler}/cur_state": 3})
    assert watched(pi, vcgencmd, "0x0", "0x0", "0x0").void is None
    write(pi, {f"{cooler}/type": "thermal-cpufreq-0"})
    assert "thermal-cpufreq-0" in (watched(pi, vcgencmd, "0x0", "0x0", "0x0").void or "")


def test_over_current_counted_during_the_timing_voids_it(pi: Path, vcgencmd: Callable[[str], None]) -> None:
    write(pi, {"sys/class/hwmon/hwmon3/oc3_event_cnt": 7})
    watch = Watch(Board(pi), Hours())
    watch.after()
    assert watch.void is None
    watch = Watch(Board(pi), Hours())
    write(pi, {"sys/class/hwmon/hwmon3/oc3_event_cnt": 8})
    watch.after()
    assert "over-current" in (watch.void or "")


def test_a_governor_other_than_performance_is_a_warning(pi: Path, vcgencmd: Callable[[str], None]) -> None:
    def warned() -> bool:
        return any("ondemand" in text for text in watched(pi, vcgencmd, "0x0", "0x0", "0x0").warnings())

    assert warned()
    write(pi, {f"sys/devices/system/cpu/cpu{CORE}/cpufreq/scaling_governor": "performance"})
    assert not warned()


def test_a_pi_whose_throttling_cannot_be_seen_says_so(
    pi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no vcgencmd" in " ".join(Watch(Board(pi)).warnings())


def test_power_is_the_sum_of_rails_whose_current_is_known(pi: Path, vcgencmd: Callable[[str], None]) -> None:
    assert rails_watts(PMIC) == pytest.approx(0.1 * 3.7 + 2.0 * 0.8)
    assert rails_watts("EXT5V_V volt(24)=5.1V\n") is None
    assert Board(pi).state("before", 0)["power_w"] == pytest.approx(1.97)


def test_a_jetsons_power_is_that_of_its_input(tmp_path: Path) -> None:
    sensor = "sys/class/hwmon/hwmon1"
    write(tmp_path, {f"{sensor}/in1_label": "VDD_IN", f"{sensor}/in1_input": 5000, f"{sensor}/curr1_input": 1500})
    write(tmp_path, {f"{sensor}/in2_label": "VDD_SOC", f"{sensor}/in2_input": 5000, f"{sensor}/curr2_input": 9000})
    assert Meter(tmp_path).watts() == pytest.approx(7.5)


def test_of_several_power_sensors_none_is_taken_for_the_whole(tmp_path: Path) -> None:
    write(tmp_path, {"sys/class/hwmon/hwmon0/power1_input": 4_000_000})
    assert Meter(tmp_path).watts() == pytest.approx(4)
    write(tmp_path, {"sys/class/hwmon/hwmon1/power1_input": 2_000_000})
    assert Meter(tmp_path).watts() is None


def test_energy_is_power_times_the_median_time(tmp_path: Path) -> None:
    write(tmp_path, {"sys/class/hwmon/hwmon0/power1_input": 4_000_000})
    assert Meter(tmp_path / "nothing").energy_mj(block_of(lambda: None)) is None

    def block(runs: int, seconds: float) -> list[float]:
        block_of(lambda: sum(range(1000)))(runs, seconds)
        return [0.001, 0.002, 0.9]

    assert Meter(tmp_path).energy_mj(block, 0.3) == pytest.approx(4 * 0.002 * 1e3)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({0: 1800, 1: 1800, 2: 2400, 3: 2400}, {2, 3}),
        ({0: 2400, 1: 2400}, set()),
        ({0: 1800, 1: None}, set()),
    ],
)
def test_big_cores_are_those_with_the_highest_clock(
    tmp_path: Path, limits: dict[int, int | None], expected: set[int]
) -> None:
    for core, limit in limits.items():
        if limit is not None:
            write(tmp_path, {f"sys/devices/system/cpu/cpu{core}/cpufreq/cpuinfo_max_freq": limit * 1000})
    assert affinity.fastest(set(limits), tmp_path) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system: binding was not checked")
def test_binding_to_big_cores_is_done_and_told(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core only: binding was not checked")
    for core in cores:
        limit = 2400000 if core == cores[-1] else 1800000
        write(tmp_path, {f"sys/devices/system/cpu/cpu{core}/cpufreq/cpuinfo_max_freq": limit})
    try:
        words, warning = affinity.bind(2, tmp_path)
        assert os.sched_getaffinity(0) == set(cores)
        assert "more than the 1 big cores" in (warning or "")
        words, warning = affinity.bind(1, tmp_path)
        assert os.sched_getaffinity(0) == {cores[-1]}
        assert (words, warning) == (f"bound to the big cores {cores[-1]}", None)
    finally:
        os.sched_setaffinity(0, cores)
