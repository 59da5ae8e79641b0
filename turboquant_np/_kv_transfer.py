"""Sequences leaving the cache: to host memory and back, and to a file and back."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ._pages import Page, Sequence
from ._spec import FORMAT_VERSION
from .storage.atomic import atomic_write
from .storage.metadata import Metadata, StorageError, checksum, rotation_array

if TYPE_CHECKING:
    from .kv_cache import PagedKVCache

__all__ = [
    "SwappedSequence",
    "fill_cache",
    "read_cache",
    "swap_in",
    "swap_out",
    "write_cache",
]

FORMAT = "turboquant_np.kv_cache"
PACKED_ARRAYS = ("_k_packed", "_k_norms", "_v_packed", "_v_norms")
FULL_ARRAYS = ("_k_full", "_v_full")

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class SwappedSequence:
    """A sequence in host memory: its pages of each pool in order, [num_layers, pages, ...]."""

    length: int
    full: list[bool]
    arrays: Arrays
    key_offset: npt.NDArray[np.float32] | None

    @property
    def nbytes(self) -> int:
        offset = 0 if self.key_offset is None else self.key_offset.nbytes
        return offset + sum(array.nbytes for array in self.arrays.values())


def swap_out(cache: PagedKVCache, state: Sequence) -> SwappedSequence:
    """Copy a sequence to host memory."""
    offset = None if state.offset is None else _to_host(cache._key_offsets[:, state.offset])
    numbers = {
        full: np.array([p.number for p in state.pages if p.full == full], np.int64)
        for full in (True, False)
    }
    arrays = _copy_pages(cache, numbers[True], numbers[False])
    return SwappedSequence(state.length, [p.full for p in state.pages], arrays, offset)


def swap_in(cache: PagedKVCache, swapped: SwappedSequence) -> Sequence:
    """Put a sequence into free pages.

    Raises
    ------
    OutOfPagesError
        If there are not enough; nothing is changed.
    """
    cache._full.require(sum(swapped.full))
    cache._packed.require(len(swapped.full) - sum(swapped.full))
    cache._offsets.require(int(swapped.key_offset is not None))
    pages = [Page(f, (cache._full if f else cache._packed).take()) for f in swapped.full]
    numbers = {f: [p.number for p in pages if p.full == f] for f in (True, False)}
    _place_pages(cache, numbers[True], numbers[False], swapped.arrays)
    offset = None
    if swapped.key_offset is not None:
        offset = cache._offsets.take()
        cache._key_offsets[:, offset] = cache._xp.asarray(swapped.key_offset)
    return Sequence(swapped.length, pages, offset)


def _copy_pages(cache: PagedKVCache, full: Any, packed: Any) -> Arrays:
    xp = cache._xp
    return {
        name: _to_host(getattr(cache, name)[:, xp.asarray(numbers)])
        for names, numbers in ((PACKED_ARRAYS, packed), (FULL_ARRAYS, full))
        for name in names
    }


def _place_pages(cache: PagedKVCache, full: Any, packed: Any, arrays: Arrays) -> None:
    xp = cache._xp
    for names, numbers in ((PACKED_ARRAYS, packed), (FULL_ARRAYS, full)):
        for name in names:
            if len(numbers):
                index = xp.asarray(np.asarray(numbers, np.int64))
                getattr(cache, name)[:, index] = xp.asarray(arrays[name])


def _to_host(array: Any) -> Any:
    return array.get() if hasattr(array, "get") else np.array(array)


# -- files -----------------------------------------------------------------------------------------


def write_cache(cache: PagedKVCache, path: str | os.PathLike[str]) -> None:
    """Write all sequences; shared pages once."""
    full, packed, offsets = cache._full.used, cache._packed.used, cache._offsets.used
    arrays = {
        name.lstrip("_"): array
        for name, array in _copy_pages(cache, np.array(full, int), np.array(packed, int)).items()
    }
    arrays["key_offsets"] = _to_host(cache._key_offsets[:, offsets])
    states = list(cache._sequences.items())
    arrays["sequences"] = np.array(
        [
            (
                identifier,
                s.length,
                len(s.pages),
                -1 if s.offset is None else offsets.index(s.offset),
            )
            for identifier, s in states
        ],
        np.int64,
    ).reshape(-1, 4)
    place = {True: {n: i for i, n in enumerate(full)}, False: {n: i for i, n in enumerate(packed)}}
    arrays["pages"] = np.array(
        [(page.full, place[page.full][page.number]) for _, s in states for page in s.pages],
        np.int64,
    ).reshape(-1, 2)
    for name in ("k_full", "v_full"):
        arrays[name] = arrays[name].view(f"u{arrays[name].itemsize}")
    quantizers = {"key": cache.key_quantizer, "value": cache.value_quantizer}
    for side, quantizer in quantizers.items():
        matrix = rotation_array(quantizer)
        if matrix is not None:
            arrays[f"{side}_rotation"] = matrix
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "settings": cache.settings,
        **{
            f"{side}_quantizer": Metadata.describe(q, q.dtype, (0, cache.head_dim)).to_json()
            for side, q in quantizers.items()
        },
        "crc32": {name: checksum(np.ascontiguousarray(a).data) for name, a in arrays.items()},
    }
    text = json.dumps(record, sort_keys=True)
    arrays["metadata"] = np.array([text, checksum(text)], np.bytes_)
    with atomic_write(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_cache(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Arrays]:
    """Settings of a cache (quantisers included) and its arrays.

    Raises
    ------
    StorageError
        If the file is damaged, of another kind or of a newer version.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as members:
            arrays = {name: members[name] for name in members.files}
        text, crc = (bytes(part).decode() for part in arrays.pop("metadata"))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise StorageError(f"{path} is not a complete cache file: {error}") from error
    if checksum(text) != crc:
        raise StorageError(f"{path}: the metadata are damaged")
    record = json.loads(text)
    if record.get("format") != FORMAT:
        raise StorageError(f"{path} holds no cache")
    if record["format_version"] > FORMAT_VERSION:
        raise StorageError(
            f"{path} has format version {record['format_version']}, this release reads up to "
            f"{FORMAT_VERSION}; upgrade turboquant-np"
        )
    found = {name: checksum(np.ascontiguousarray(a).data) for name, a in arrays.items()}
    if found != record["crc32"]:
        wrong = sorted(n for n in record["crc32"] if found.get(n) != record["crc32"][n])
        raise StorageError(f"{path}: damaged or missing arrays: {', '.join(wrong) or 'too many'}")
    settings = record["settings"]
    for side in ("key", "value"):
        description = Metadata.from_json(record[f"{side}_quantizer"])
        rotation = arrays.pop(f"{side}_rotation", None)
        settings[f"{side}_quantizer"] = description.make_quantizer(rotation)
    return settings, arrays


def fill_cache(cache: PagedKVCache, arrays: Arrays) -> None:
    """Put the arrays of a file into an empty cache with pages enough.

    Raises
    ------
    OutOfPagesError
    """
    count = {True: arrays["k_full"].shape[1], False: arrays["k_packed"].shape[1]}
    cache._full.require(count[True])
    cache._packed.require(count[False])
    cache._offsets.require(arrays["key_offsets"].shape[1])
    restored = {f"_{name}": array for name, array in arrays.items()}
    for name in FULL_ARRAYS:
        restored[name] = restored[name].view(cache.dtype)
    taken = {
        full: [pool.take() for _ in range(count[full])]
        for full, pool in ((True, cache._full), (False, cache._packed))
    }
    _place_pages(cache, taken[True], taken[False], restored)
    slots = [cache._offsets.take() for _ in range(arrays["key_offsets"].shape[1])]
    if slots:
        cache._key_offsets[:, slots] = cache._xp.asarray(arrays["key_offsets"])
    pages = [Page(bool(full), taken[bool(full)][number]) for full, number in arrays["pages"]]
    start = 0
    for identifier, length, size, offset in arrays["sequences"].tolist():
        own = pages[start : start + size]
        start += size
        cache._sequences[identifier] = Sequence(length, own, None if offset < 0 else slots[offset])
        cache._next_sequence = max(cache._next_sequence, identifier + 1)
    for full, pool in ((True, cache._full), (False, cache._packed)):
        for number in taken[full]:
            pool.references[number] = sum(
                page == Page(full, number) for s in cache._sequences.values() for page in s.pages
            )
    for slot in slots:
        cache._offsets.references[slot] = sum(s.offset == slot for s in cache._sequences.values())
