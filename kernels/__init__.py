"""Low-bit primitives in plain torch: packing, affine quantization. This root is a docstring only; import the submodules."""
