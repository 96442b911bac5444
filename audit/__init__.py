"""Encrypted against clear, both halves in one process: the demonstration, verification on real images."""
