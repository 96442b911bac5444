"""Compiled kernels over arrays of residues; they know nothing of plans, keys or wire formats."""
