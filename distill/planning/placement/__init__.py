"""Which rank trains which blocks."""
