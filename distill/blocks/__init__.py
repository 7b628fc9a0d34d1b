"""A teacher as a chain of blocks: tracing, cutting, and what a block is."""
