"""Cutting a network into blocks: tracing it, finding its cut points, grouping what lies between them."""
