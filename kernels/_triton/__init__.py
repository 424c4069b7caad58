"""Triton code, one file for each file of `kernels`; imported only where it is about to run or be compiled."""
