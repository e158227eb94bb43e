"""Products of quantized operands: exactly on integers, or simulated on their float values."""
