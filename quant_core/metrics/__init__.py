"""How close a quantized model is to the original, and what it costs."""
