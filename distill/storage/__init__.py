"""Files of a run, whole or not at all."""
