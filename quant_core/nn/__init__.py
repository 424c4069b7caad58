"""Quantized modules: layers, activations, attention, tables of features, and what tells them the trajectory step."""
