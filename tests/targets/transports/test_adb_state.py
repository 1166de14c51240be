"""What Android's commands print, as their sources document it, becomes a state; what is not there stays unknown."""

import pytest

from targets.transports._adb_state import parsed

CPU = "/sys/devices/system/cpu"
TEXT = f"""\
#battery
Current Battery Service state:
  AC powered: false
  USB powered: true
  Max charging current: 500000
  level: 64
  scale: 100
  temperature: 298
#thermal
IsStatusOverride: false
Thermal Status: 0
Cached temperatures:
\tTemperature{{mValue=91.0, mType=0, mName=cpu-old, mStatus=0}}
HAL Ready: true
Current temperatures from HAL:
\tTemperature{{mValue=41.5, mType=0, mName=cpu-0-0, mStatus=0}}
\tTemperature{{mValue=43.25, mType=0, mName=cpu-1-0, mStatus=0}}
\tTemperature{{mValue=70.0, mType=3, mName=skin, mStatus=0}}
Current cooling devices from HAL:
#cpu
{CPU}/cpu0/cpufreq/scaling_cur_freq 576000
{CPU}/cpu7/cpufreq/scaling_cur_freq 2841600
{CPU}/cpu0/cpufreq/cpuinfo_max_freq 1804800
{CPU}/cpu7/cpufreq/cpuinfo_max_freq 2841600
{CPU}/cpu0/cpufreq/scaling_governor schedutil
{CPU}/cpu7/cpufreq/scaling_governor schedutil"""


def test_clock_heat_and_battery_are_read() -> None:
    state = parsed(TEXT)
    assert state.clock_mhz == 2841.6
    assert state.temperature_c == 43.25  # the processors' now: not a remembered one, not the skin's
    assert state.governor == "schedutil"
    assert (state.level, state.charging) == (64, True)
    assert state.limits == {0: 1804.8, 7: 2841.6}
    assert state.throttled is None
    assert state.entry("before", 0.5)["minute"] == 0.5


@pytest.mark.parametrize(("status", "word"), [(1, "light"), (3, "severe"), (9, "shutdown")])
def test_a_thermal_status_is_said_in_words(status: int, word: str) -> None:
    assert parsed(TEXT.replace("Thermal Status: 0", f"Thermal Status: {status}")).throttled == f"thermal status {word}"


def test_the_batterys_temperature_stands_in_for_the_processors() -> None:
    assert parsed(TEXT.replace("mType=0", "mType=5")).temperature_c == 29.8


def test_a_device_that_says_nothing_is_unknown() -> None:
    state = parsed("#battery\n#thermal\n#cpu")
    assert (state.clock_mhz, state.temperature_c, state.governor, state.thermal) == (None, None, None, None)
    assert (state.level, state.charging, state.limits, state.throttled) == (None, None, {}, None)
