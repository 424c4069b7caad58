"""Low-bit primitives in plain torch: packing, affine quantization. A docstring only; import the submodules."""
