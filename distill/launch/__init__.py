"""Starting ranks, sweeps and jobs, and ending them."""
