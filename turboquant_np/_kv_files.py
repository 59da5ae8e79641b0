"""A cache in a file: its sequences, packed as they are.

Version 2 of the file has a group of arrays for all layers with the same quantisers, named
``k_packed_0``, ``k_packed_1``, ...; version 1 knew a single group, without a number.  The
numeric format of the codes has its own version, in the description of each quantiser.
"""

from __future__ import annotations

import json
import os
import zipfile
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._kv_memory import FULL_ARRAYS
from ._kv_swap import Arrays, copy_pages, place_pages
from ._pages import Page, Sequence
from .storage.atomic import atomic_write
from .storage.metadata import Metadata, StorageError, checksum, rotation_array

if TYPE_CHECKING:
    from .kv_cache import PagedKVCache

__all__ = ["SavedCache", "fill_cache", "read_cache", "write_cache"]

FORMAT = "turboquant_np.kv_cache"
FILE_VERSION = 2
SIDES = ("key", "value")


class SavedCache(NamedTuple):
    """What a file holds.

    Attributes
    ----------
    settings : arguments of the constructor, quantisers of each layer included
    groups : arrays of each group of layers
    sequences : int64 [sequences, 4]: identifier, tokens, pages, key offset or -1
    pages : int64 [pages of all sequences, 2]: whether in full precision, place among those saved
    """

    settings: dict[str, Any]
    groups: list[Arrays]
    sequences: Any
    pages: Any


def write_cache(cache: PagedKVCache, path: str | os.PathLike[str]) -> None:
    """Write all sequences; shared pages once."""
    full, packed, offsets = cache._full.used, cache._packed.used, cache._offsets.used
    arrays: Arrays = {}
    groups = []
    for number, memory in enumerate(cache._groups):
        copies = copy_pages(memory, full, packed, offsets)
        for name in FULL_ARRAYS:  # as integers: NumPy has no name for bfloat16 in files
            copies[name] = copies[name].view(f"u{copies[name].itemsize}")
        group: dict[str, Any] = {"layers": list(memory.layers)}
        for side in SIDES:
            quantizer = getattr(memory, f"{side}_quantizer")
            text = Metadata.describe(quantizer, quantizer.dtype, (0, cache.head_dim)).to_json()
            group[f"{side}_quantizer"] = text
            matrix = rotation_array(quantizer)
            if matrix is not None:
                copies[f"{side}_rotation"] = matrix
        groups.append(group)
        arrays |= {f"{name}_{number}": array for name, array in copies.items()}
    arrays |= _tables(cache, full, packed, offsets)
    record = {
        "format": FORMAT,
        "format_version": FILE_VERSION,
        "settings": cache.settings,
        "groups": groups,
        "crc32": {name: _checksum(array) for name, array in arrays.items()},
    }
    text = json.dumps(record, sort_keys=True)
    arrays["metadata"] = np.array([text, checksum(text)], np.bytes_)
    with atomic_write(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def _tables(cache: PagedKVCache, full: list[int], packed: list[int], offsets: list[int]) -> Arrays:
    """The sequences, and their pages as places among those that are saved."""
    states = list(cache._sequences.items())
    offset_at = {slot: i for i, slot in enumerate(offsets)} | {None: -1}
    page_at = {Page(True, n): i for i, n in enumerate(full)}
    page_at |= {Page(False, n): i for i, n in enumerate(packed)}
    rows = [(i, s.length, len(s.pages), offset_at[s.offset]) for i, s in states]
    pages = [(page.full, page_at[page]) for _, s in states for page in s.pages]
    return {
        "sequences": np.array(rows, np.int64).reshape(-1, 4),
        "pages": np.array(pages, np.int64).reshape(-1, 2),
    }


def read_cache(path: str | os.PathLike[str]) -> SavedCache:
    """Read and check a file.

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
    if record["format_version"] > FILE_VERSION:
        raise StorageError(
            f"{path} is a cache file of version {record['format_version']}, this release reads up "
            f"to {FILE_VERSION}; upgrade turboquant-np"
        )
    found = {name: _checksum(array) for name, array in arrays.items()}
    if found != record["crc32"]:
        wrong = sorted(n for n in record["crc32"] if found.get(n) != record["crc32"][n])
        raise StorageError(f"{path}: damaged or missing arrays: {', '.join(wrong) or 'too many'}")
    if record["format_version"] == 1:
        record["groups"] = [{**record, "layers": range(record["settings"]["num_layers"])}]
        arrays = {
            name if name in ("sequences", "pages") else f"{name}_0": array
            for name, array in arrays.items()
        }
    return _restore(record, arrays)


def _restore(record: dict[str, Any], arrays: Arrays) -> SavedCache:
    """Quantisers from their descriptions, and arrays by group."""
    settings, groups = record["settings"], []
    for side in SIDES:
        settings[f"{side}_quantizer"] = [None] * settings["num_layers"]
    for number, group in enumerate(record["groups"]):
        ending = f"_{number}"
        own = {n.removesuffix(ending): a for n, a in arrays.items() if n.endswith(ending)}
        for side in SIDES:
            description = Metadata.from_json(group[f"{side}_quantizer"])
            quantizer = description.make_quantizer(own.pop(f"{side}_rotation", None))
            for layer in group["layers"]:
                settings[f"{side}_quantizer"][layer] = quantizer
        groups.append(own)
    return SavedCache(settings, groups, arrays["sequences"], arrays["pages"])


def fill_cache(cache: PagedKVCache, saved: SavedCache) -> None:
    """Put what a file holds into an empty cache with pages enough.

    Raises
    ------
    OutOfPagesError
    """
    first = saved.groups[0]
    pools = {
        "k_full": cache._full,
        "k_packed": cache._packed,
        "key_offsets": cache._offsets,
    }
    for name, pool in pools.items():
        pool.require(first[name].shape[1])
    full, packed, offsets = (
        [pool.take() for _ in range(first[name].shape[1])] for name, pool in pools.items()
    )
    for memory, arrays in zip(cache._groups, saved.groups, strict=True):
        restored = {name: arrays[name].view(cache.dtype) for name in FULL_ARRAYS}
        place_pages(memory, full, packed, offsets, arrays | restored)
    pages = [Page(bool(f), (full if f else packed)[at]) for f, at in saved.pages.tolist()]
    start = 0
    for identifier, length, size, offset in saved.sequences.tolist():
        own = pages[start : start + size]
        start += size
        state = Sequence(length, own, None if offset < 0 else offsets[offset])
        cache._sequences[identifier] = state
        cache._next_sequence = max(cache._next_sequence, identifier + 1)
    _count_references(cache)


def _count_references(cache: PagedKVCache) -> None:
    """One reference for each sequence that holds a page or an offset."""
    states = cache._sequences.values()
    for pool in (cache._full, cache._packed, cache._offsets):
        for number in pool.used:
            pool.references[number] = 0
    for page in chain.from_iterable(s.pages for s in states):
        cache._planner.pool(page).references[page.number] += 1
    for state in states:
        if state.offset is not None:
            cache._offsets.references[state.offset] += 1


def _checksum(array: Any) -> str:
    return checksum(np.ascontiguousarray(array).data)
