"""The package's version, for those who must not import anything else."""

__version__ = "0.1.0"
