"""SVDQuant: low-rank branches in 16 bits beside low-bit codes."""
