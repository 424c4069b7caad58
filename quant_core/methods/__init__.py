"""Seed methods, one file each: the paper, where we differ from its code and why, and the passes that it is made of."""
