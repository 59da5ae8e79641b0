"""Quantised arrays as values, in files, and larger than memory.

A file holds the packed codes and the scales as plain arrays that other programs can read, and one
JSON text that says how they decode.  See `turboquant_np.storage.metadata` for its fields.
"""

from .files import load, open, save
from .metadata import StorageError
from .quantized_array import QuantizedArray
from .stream import decode_npy, encode_npy

__all__ = [
    "QuantizedArray",
    "StorageError",
    "decode_npy",
    "encode_npy",
    "load",
    "open",
    "save",
]
