"""Loaded models that run on a backend's integer kernels."""
