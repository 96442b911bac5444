"""Plans for people: as plain values, as text, as a picture."""
