"""MPQ-DM: bits of output channels, and distillation of the whole model."""
