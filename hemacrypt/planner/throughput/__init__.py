"""Planning for batches: one value of the network in each ciphertext, one image in each slot."""
