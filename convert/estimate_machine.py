"""What a device's processor could do at best: operations and bytes per second, stated by its profile or derived."""

from dataclasses import dataclass, replace

from device_profiles import DeviceProfile

# float32 operations per cycle and core: recalled of Arm's and NVIDIA's guides, not read (unverified).
PER_CYCLE = {
    "Cortex-A53": 8,
    "Cortex-A57": 8,
    "Cortex-A72": 8,
    "Cortex-A76": 16,
    "Cortex-A78AE": 16,
    "Carmel": 16,
    "Neoverse-V3AE": 32,
}
DOT = "int8 with dot product"
NO_DOT = "int8 without dot product"


@dataclass(frozen=True)
class Processor:
    """Peaks of all `cores` together in 10^9 operations per second by number class, bandwidth in 10^9 bytes/s.

    `derived` says in words what the profile does not state itself.
    """

    peaks: dict[str, float]
    bandwidth: float
    clock_ghz: float
    cores: int
    derived: tuple[str, ...] = ()

    @property
    def int8(self) -> str:
        """The class of int8 kernels that this instruction set allows."""
        return DOT if DOT in self.peaks else NO_DOT

    def number_class(self, form: str) -> str:
        """The class that an operator of this number format belongs to: float16 is float32 without such arithmetic."""
        if form == "int8":
            return self.int8
        return form if form in self.peaks else "float32"

    def at_clock(self, clock_ghz: float) -> "Processor":
        """The same at another clock."""
        factor = clock_ghz / self.clock_ghz
        return replace(self, peaks={k: v * factor for k, v in self.peaks.items()}, clock_ghz=clock_ghz)

    @classmethod
    def of_facts(
        cls,
        *,
        fp32_gflops: float,
        int8_gops: float,
        bandwidth_gbs: float,
        clock_ghz: float,
        cores: int,
        dotprod: bool,
    ) -> "Processor":
        """A processor without a profile."""
        peaks = {"float32": fp32_gflops, DOT if dotprod else NO_DOT: int8_gops}
        return cls(peaks, bandwidth_gbs, clock_ghz, cores)


def processor(profile: DeviceProfile, bandwidth: float | None = None) -> Processor | str:
    """The processor of a profile, or why it can't be rated. `bandwidth` serves where the profile states none."""
    cpu, peak = profile.cpu, profile.peak
    cores = cpu.big_cores or cpu.cores
    if cpu.clock_ghz is None or cores is None:
        return f"the profile {profile.name} states no clock or number of cores"
    derived = []
    float32 = peak.fp32_gflops
    if float32 is None:
        per_cycle = PER_CYCLE.get(cpu.model)
        if per_cycle is None:
            return f"nothing says how many operations per cycle a core of {cpu.model} does"
        float32 = per_cycle * cores * cpu.clock_ghz
        derived.append(f"float32 peak derived: {cores} cores x {cpu.clock_ghz:g} GHz x {per_cycle} (recalled)")
    gbs = profile.memory.bandwidth_gbs or bandwidth
    if gbs is None:
        return f"nothing says what bandwidth the memory of {profile.name} has"
    if profile.memory.bandwidth_gbs is None:
        derived.append("bandwidth: measured by others, not in the profile")
    peaks = {"float32": float32}
    if cpu.fp16:
        peaks["float16"] = peak.fp16_gflops or 2 * float32
    factor = 8 if cpu.i8mm else 4 if cpu.dotprod else 2
    peaks[DOT if cpu.dotprod else NO_DOT] = peak.int8_gops or factor * float32
    if peak.int8_gops is None:
        why = "matrix products" if cpu.i8mm else "dot products" if cpu.dotprod else "widening products, no dot product"
        derived.append(f"int8 peak derived: {factor} x float32 ({why})")
    return Processor(peaks, gbs, cpu.clock_ghz, cores, tuple(derived))
