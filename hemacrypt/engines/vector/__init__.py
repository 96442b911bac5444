"""The fast engine: RNS-CKKS in NumPy arrays, with kernels that Numba compiles on the user's machine."""
