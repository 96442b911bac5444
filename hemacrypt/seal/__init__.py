"""SEAL's serialised objects: their format, their sizes, reading and writing them, evaluation keys."""
