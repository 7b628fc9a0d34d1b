"""Recorded activations: their form, and where they lie."""
