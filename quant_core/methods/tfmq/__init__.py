"""TFMQ-DM: the temporal information block over the sampler's finite set of timesteps."""
