"""Fitting units to a calibration set: observation, rounding, block reconstruction, allocation under a budget."""
