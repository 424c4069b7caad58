"""PTQD: correction of the noise that quantization adds, and activation bits by trajectory step."""
