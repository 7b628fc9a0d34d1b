"""Training of one block, and of the whole student."""
