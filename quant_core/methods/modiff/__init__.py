"""MoDiff: activations in differences between steps."""
