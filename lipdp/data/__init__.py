"""Data sets from the standard on-disk formats, split into train and test by rules that never look at the data.

    split = load("mnist", data_dir="~/data")
    split.train_x.shape, split.num_classes, split.task

What a set is to training is in `split`, sets that stay on disk in `stored`, `npy`, `hub` and `imagefolder`, tables in
`table_files` and what is public of their columns in `schema` and `columns`, the readers of each format in `files`,
`cifar` and `images`, the sets in `sources`, the bounding of inputs in `scaling`, random views of images in `augment`.
"""

from lipdp.data.augment import Augmented, augment
from lipdp.data.folders import Columns
from lipdp.data.opening import bound_inputs, default_bounding, is_table, load, open_split, split_validation
from lipdp.data.scaling import (
    BOUNDINGS,
    Bounding,
    Clip,
    Rescale,
    SignedLog,
    Standardise,
    Tanh,
    bounding,
    public_standardisation,
)
from lipdp.data.schema import Schema, plain_schema
from lipdp.data.sources import DATASETS
from lipdp.data.split import Split
from lipdp.data.stored import DataSplit, Stored, number_of_units
from lipdp.data.table_files import SUFFIXES, read_columns, schema_template

__all__ = [
    "BOUNDINGS",
    "DATASETS",
    "SUFFIXES",
    "Augmented",
    "Bounding",
    "Clip",
    "Columns",
    "DataSplit",
    "Rescale",
    "Schema",
    "SignedLog",
    "Split",
    "Standardise",
    "Stored",
    "Tanh",
    "augment",
    "bound_inputs",
    "bounding",
    "default_bounding",
    "is_table",
    "load",
    "number_of_units",
    "open_split",
    "plain_schema",
    "public_standardisation",
    "read_columns",
    "schema_template",
    "split_validation",
]
