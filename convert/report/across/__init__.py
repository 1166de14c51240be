"""Several conversions in one report: which device meets the budget with which artifact, and what changed since."""
