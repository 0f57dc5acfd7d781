"""Weight quantization: one file per method, and the grid that they share."""
