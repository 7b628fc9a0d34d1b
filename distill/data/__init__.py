"""Data by (seed, step): batch t is the same bits on any rank, with any number of workers, in any order of access."""

from distill.data.augment import Augment
from distill.data.dataset import Batch, Dataset, open_dataset
from distill.data.options import DataOptions

__all__ = ["Augment", "Batch", "DataOptions", "Dataset", "open_dataset"]
