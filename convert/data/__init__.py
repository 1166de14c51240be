"""Calibration and evaluation data: one reader per kind of source, one checked stream of samples for all."""

from convert.data.opening import open_data, peek, synthetic_data
from convert.data.sample_set import SampleSet, hold_out, take

__all__ = ["SampleSet", "hold_out", "open_data", "peek", "synthetic_data", "take"]
