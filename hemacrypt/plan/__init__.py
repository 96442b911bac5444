"""The plan: how one network runs under encryption, as plain data."""
