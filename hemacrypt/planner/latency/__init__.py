"""Planning for one image, or two: generalised diagonals, rotations, scales."""
