"""The specification: every operation in eager PyTorch, on any device, exact in float64."""
