"""Decoding: which tokens are legal, how one is chosen, and the loop that does it."""
