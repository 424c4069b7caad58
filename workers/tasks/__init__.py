"""Task bodies, one file a kind: a pure function from parameters and input digests to output digests and metrics."""
