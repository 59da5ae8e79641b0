"""Quantised arrays beside ordinary tensors in one .safetensors file, loadable by name.

A quantised array called ``name`` takes the tensors ``name.packed`` (uint8) and ``name.norms``
(float32), for a rotation matrix of the user also ``name.rotation`` (int32), and the JSON text
``turboquant_np.name`` in the file's metadata, whose fields `turboquant_np.storage.metadata`
describes.  Other programs see plain tensors.  Needs the `io` extra.

For a single array, `turboquant_np.save` and `turboquant_np.open` are simpler.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _arrays
from ._extras import missing_extra
from .storage import QuantizedArray, StorageError
from .storage.container import array_bytes
from .storage.metadata import ArrayInfo, Metadata, checksum, rotation_array
from .storage.safetensors import METADATA_KEY, read_header

try:
    from safetensors.numpy import save_file as _save_arrays
except ImportError as error:
    raise missing_extra(__name__, "io", error) from error

__all__ = ["TensorFile", "save_file"]

PREFIX = METADATA_KEY + "."
DTYPES = {
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
    **{f"{k}{8 * size}": np.dtype(f"<{k.lower()}{size}") for k in "IU" for size in (1, 2, 4, 8)},
    "BOOL": np.dtype(bool),
    "C64": np.dtype("<c8"),
}


def save_file(
    tensors: Mapping[str, Any],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write quantised arrays and ordinary tensors to one file.

    Parameters
    ----------
    tensors : mapping of str to QuantizedArray or array
        Arrays of NumPy, or of any library with DLPack, on the CPU or a GPU.
    path : path-like
    metadata : mapping of str to str, optional
        More texts for the file's metadata.

    Raises
    ------
    TypeError
        If a value is no array.
    ValueError
        If two names would take the same tensor, or the metadata use the library's own keys.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from turboquant_np import QuantizedArray, TurboQuant
    >>> from turboquant_np.safetensors import TensorFile, save_file
    >>> x = np.random.default_rng(0).standard_normal((1000, 64)).astype(np.float32)
    >>> embedding = QuantizedArray.encode(x, TurboQuant(head_dim=64, bits=4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"embedding": embedding, "bias": np.ones(3)}, f"{folder}/model.safetensors")
    ...     model = TensorFile(f"{folder}/model.safetensors")
    >>> model
    TensorFile('model.safetensors': bias, embedding)
    >>> model["embedding"][10:12].decode().shape, model["bias"].tolist()
    ((2, 64), [1.0, 1.0, 1.0])
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    texts = dict(metadata or {})
    if taken := [key for key in texts if key == METADATA_KEY or key.startswith(PREFIX)]:
        raise ValueError(f"metadata keys that start with {METADATA_KEY} are ours: {taken}")
    for name, value in tensors.items():
        parts = {name: value}
        if isinstance(value, QuantizedArray):
            parts, texts[PREFIX + name] = _parts(name, value)
        if both := sorted(set(parts) & set(arrays)):
            raise ValueError(f"two tensors would be called {', '.join(both)}; rename one")
        arrays |= {part: _on_host(array, part) for part, array in parts.items()}
    _save_arrays(arrays, path, texts or None)


class TensorFile(Mapping[str, Any]):
    """The tensors of a .safetensors file by name, memory-mapped: nothing is read before it is used.

    A mapping whose values are `QuantizedArray` objects and NumPy arrays, all of them read-only
    views of the file (an array that another program wrote unaligned is copied).

    Parameters
    ----------
    path : path-like
        Of a file made by `save_file`, or any other .safetensors file.
    verify : bool, default False
        Read the codes and scales of all quantised arrays once and verify their checksums.
    backend : str
        Of the quantisers, see `TurboQuantConfig`.

    Raises
    ------
    StorageError
        If the file is damaged, cut off, or of a newer format version (a ValueError).
    OSError
        If it cannot be read.

    Examples
    --------
    See `save_file`.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, verify: bool = False, backend: str = "auto"
    ) -> None:
        self.path = Path(path)
        self.backend = backend
        with self.path.open("rb") as file:
            texts, self._entries, self._start = read_header(file)
        self._quantized = {
            key.removeprefix(PREFIX): self._parse(key, text)
            for key, text in texts.items()
            if key.startswith(PREFIX)
        }
        self.metadata = {key: text for key, text in texts.items() if not key.startswith(PREFIX)}
        self._data = np.memmap(self.path, np.uint8, "r") if self._entries else np.empty(0, np.uint8)
        parts = [
            replace(array, name=f"{name}.{array.name}")
            for name, metadata in self._quantized.items()
            for array in metadata.arrays
        ]
        for part in parts:
            self._check_found(part)
        names = {*self._quantized, *self._entries} - {part.name for part in parts}
        self._names = sorted(names)
        if verify:
            for name in self._quantized:
                self._verify(name)

    def __getitem__(self, name: str) -> Any:
        if name not in self._quantized:
            if name not in self._names:
                raise KeyError(f"{name!r}; {self.path.name} has {', '.join(self._names)}")
            return self._view(name)
        metadata = self._quantized[name]
        arrays = {a.name: self._view(f"{name}.{a.name}") for a in metadata.arrays}
        if "rotation" in arrays:
            self._verify(name, "rotation")  # a wrong matrix would give plausible wrong vectors
        quantizer = metadata.make_quantizer(arrays.get("rotation"), self.backend)
        return QuantizedArray(arrays["packed"], arrays["norms"], quantizer, metadata.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"TensorFile({self.path.name!r}: {', '.join(self._names)})"

    def _parse(self, key: str, text: str) -> Metadata:
        try:
            return Metadata.from_json(text)
        except StorageError as error:
            raise StorageError(f"{self.path}: {key.removeprefix(PREFIX)}: {error}") from error

    def _check_found(self, part: ArrayInfo) -> None:
        found = self._entries.get(part.name, {"dtype": "missing", "shape": []})
        if DTYPES.get(found["dtype"]) != part.dtype or tuple(found["shape"]) != part.shape:
            raise StorageError(
                f"{self.path}: the metadata promise a tensor {part.name!r}, {part.dtype} "
                f"{list(part.shape)}; found {found['dtype']} {found['shape']}"
            )

    def _view(self, tensor: str) -> npt.NDArray[Any]:
        entry = self._entries[tensor]
        start, stop = (self._start + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            dtype = _arrays.float_dtype("bfloat16")
        elif entry["dtype"] in DTYPES:
            dtype = DTYPES[entry["dtype"]]
        else:
            raise TypeError(
                f"{tensor} has dtype {entry['dtype']}, which NumPy lacks; "
                "read it with the safetensors library of another framework"
            )
        array = np.asarray(self._data[start:stop]).view(dtype).reshape(entry["shape"])
        return array if array.flags.aligned else array.copy()

    def _verify(self, name: str, *only: str) -> None:
        for part, stated in self._quantized[name].crc32.items():
            if only and part not in only:
                continue
            found = checksum(array_bytes(self._view(f"{name}.{part}")))
            if found != stated:
                raise StorageError(
                    f"{self.path}: the tensor '{name}.{part}' is damaged: its checksum is "
                    f"{found}, the metadata say {stated}"
                )


def _parts(name: str, quantized: QuantizedArray) -> tuple[dict[str, Any], str]:
    """The tensors of a quantised array, and the text that describes them."""
    arrays = {"packed": quantized.packed, "norms": quantized.norms}
    if (rotation := rotation_array(quantized.quantizer)) is not None:
        arrays["rotation"] = rotation
    metadata = Metadata.describe(quantized.quantizer, quantized.dtype, quantized.shape)
    metadata = replace(metadata, crc32={k: checksum(array_bytes(a)) for k, a in arrays.items()})
    return {f"{name}.{part}": array for part, array in arrays.items()}, metadata.to_json()


def _on_host(value: Any, name: str) -> npt.NDArray[Any]:
    array, _ = _arrays.take_in(value, name)
    return np.asarray(array.get() if hasattr(array, "get") else array, order="C")
