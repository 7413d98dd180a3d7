"""Data to train on: toy densities, digits, the user's own tables, and their preprocessing."""

from .baseline import GaussianBaseline
from .dataset import SOURCES, Dataset, load
from .errors import InputError, nearest
from .streams import stream
from .table import Table, read_table
from .toys import TOYS
from .transforms import Logit, Preprocess, Standardize, Whiten

__all__ = [
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
    "load",
    "nearest",
    "read_table",
    "stream",
]
