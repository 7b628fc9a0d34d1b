"""Streams: the batches that one rank trains on, wherever they are computed."""
