"""The distill stage on one rank: the loop, its streams, and how blocks come and go."""
