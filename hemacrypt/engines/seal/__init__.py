"""The reference: every step by SEAL's own operations."""
