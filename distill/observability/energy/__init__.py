"""Joules: counters, one reader a host, sums."""
