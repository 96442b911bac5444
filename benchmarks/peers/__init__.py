"""Other systems on the same networks; each script runs under that system's own Python and needs NumPy besides it."""
