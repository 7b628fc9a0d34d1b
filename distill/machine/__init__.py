"""The machine that a process runs on: which host, and what of it may be used."""
