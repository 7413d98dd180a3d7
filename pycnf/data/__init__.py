"""Data to train on: toy densities, digits, the user's own tables, and their preprocessing."""

from .baseline import GaussianBaseline
from .dataset import SOURCES, Dataset, load
from .digits import BITS_PER_DIM, BITS_PER_DIM_WHERE, LEVELS, SHAPE, bits_per_dim, quantize
from .errors import InputError, nearest
from .streams import stream
from .table import Table, read_table
from .toys import TOYS
from .transforms import Logit, Preprocess, Standardize, Whiten

__all__ = [
    "BITS_PER_DIM",
    "BITS_PER_DIM_WHERE",
    "LEVELS",
    "SHAPE",
    "SOURCES",
    "TOYS",
    "Dataset",
    "GaussianBaseline",
    "InputError",
    "Logit",
    "Preprocess",
    "Standardize",
    "Table",
    "Whiten",
    "bits_per_dim",
    "load",
    "nearest",
    "quantize",
    "read_table",
    "stream",
]
