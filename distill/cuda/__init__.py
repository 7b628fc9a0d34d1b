"""What is CUDA's own: streams, graphs, clocks."""
