"""Triton kernels: a file per row, a launcher with the name and arguments of each reference.

No launcher reads a device tensor, so that all can be captured in a CUDA graph. Importing a row
imports Triton; `kvtools.ops` does it when a kernel first runs.
"""
