"""TurboQuant for NumPy and CuPy arrays: near-optimal 1-8 bit vector quantisation, online."""

from ._spec import FORMAT_VERSION
from .config import TurboQuantConfig
from .fused_attention import TQPagedAttention, merge_attention
from .kv_cache import OutOfPagesError, PagedKVCache
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
    "OutOfPagesError",
    "PagedKVCache",
    "QuantizedArray",
    "StorageError",
    "TQPagedAttention",
    "TurboQuant",
    "TurboQuantConfig",
    "__version__",
    "decode_npy",
    "encode_npy",
    "load",
    "merge_attention",
    "open",
    "save",
]
