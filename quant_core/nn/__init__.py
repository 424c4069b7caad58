"""Quantized modules (layers, activations, attention, tables of features), and the clock of their trajectory step."""
