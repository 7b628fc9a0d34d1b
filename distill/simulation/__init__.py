"""Jobs that never ran, on described hardware."""
