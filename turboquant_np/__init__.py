"""TurboQuant for NumPy and CuPy arrays: near-optimal 1-8 bit vector quantisation, online."""

from ._spec import FORMAT_VERSION
from .config import TurboQuantConfig
from .quantizer import TurboQuant
from .storage import (
    QuantizedArray,
    StorageError,
    decode_npy,
    encode_npy,
    load,
    open,
    save,
)

__version__ = "0.1.0"

__all__ = [
    "FORMAT_VERSION",
    "QuantizedArray",
    "StorageError",
    "TurboQuant",
    "TurboQuantConfig",
    "__version__",
    "decode_npy",
    "encode_npy",
    "load",
    "open",
    "save",
]
