"""What a run shows of itself: spans, scalars, lines on a terminal, joules."""
