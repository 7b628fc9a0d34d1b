"""Folders that come with the package but are no part of it; `distill slurm` says where the batch scripts are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def shipped(name: str) -> Path:
    """Return the folder of this name: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(folder for folder in (package / name, package.parent / name) if folder.is_dir())


def main(arguments: Sequence[str]) -> int:
    """Print the folder of the batch scripts, for a command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m distill slurm",
        description="print the folder of distill.sbatch and sweep.sbatch: "
        'sbatch --nodes=2 "$(python -m distill slurm)/distill.sbatch" data=digits',
    )
    parser.parse_args(arguments)
    sys.stdout.write(f"{shipped('slurm')}\n")
    return 0
