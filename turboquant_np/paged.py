"""`encode_paged`: keys and values straight into the blocks of a paged cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _arrays, _backend
from ._checks import check_same_place, check_vectors, value_error
from ._spec import CodecSpec
from .quantizer import TurboQuant

__all__ = ["encode_paged"]


def encode_paged(
    keys: Any,
    values: Any,
    k_packed: Any,
    k_norms: Any,
    v_packed: Any,
    v_norms: Any,
    slot_mapping: Any,
    *,
    key_quantizer: TurboQuant,
    value_quantizer: TurboQuant | None = None,
    check: bool = True,
) -> None:
    """Encode the keys and values of new tokens and write them to their slots in a paged cache.

    Slot s is token ``s % block_size`` of block ``s // block_size``.  On a GPU this is one kernel
    launch for keys and values together (two where their quantisers differ in head_dim, and several
    for dense rotations).

    Parameters
    ----------
    keys, values : array, shape [num_tokens, num_kv_heads, head_dim]
        float16, bfloat16, float32 or float64.
    k_packed, v_packed : array, uint8, shape [num_blocks, block_size, num_kv_heads, packed_dim]
        The cache, written in place; any strides, the last axis contiguous.
    k_norms, v_norms : array, float32, shape [num_blocks, block_size, num_kv_heads]
        Any strides.
    slot_mapping : array, int32 or int64, shape [num_tokens]
        Where each token goes; -1 skips it.
    key_quantizer : TurboQuant
    value_quantizer : TurboQuant, optional
        By default the key quantiser.
    check : bool, default True
        Check slots and values, which on a GPU waits for the result.  When switched off, slots
        outside of the cache are skipped, of equal slots an arbitrary one is kept, and vectors that
        are not finite get the scale NaN.

    Raises
    ------
    TypeError
        If a dtype is wrong.
    ValueError
        If shapes, devices or strides do not fit; with `check`, if a slot is below -1, beyond the
        cache or named twice, or a value is NaN or infinite (the cache is then written in part).
    OverflowError
        With `check`, if a scale exceeds the largest float32.

    Examples
    --------
    >>> import numpy as np
    >>> from turboquant_np import TurboQuant
    >>> from turboquant_np.paged import encode_paged
    >>> tq = TurboQuant(head_dim=64, bits=4)
    >>> packed = np.zeros((2, 2, 16, 8, tq.packed_dim), np.uint8)  # keys and values, 2 blocks of 16
    >>> norms = np.zeros((2, 2, 16, 8), np.float32)
    >>> new = np.random.default_rng(0).standard_normal((3, 8, 64)).astype(np.float16)
    >>> slots = np.array([17, -1, 0])
    >>> encode_paged(new, new, packed[0], norms[0], packed[1], norms[1], slots, key_quantizer=tq)
    >>> bool((norms[0, 1, 1] > 0).all()), int((norms[0] > 0).sum())
    (True, 16)
    """
    quantizers = (key_quantizer, key_quantizer if value_quantizer is None else value_quantizer)
    specs = [quantizer._spec for quantizer in quantizers]
    vectors = [_arrays.take_in(x, name)[0] for x, name in ((keys, "keys"), (values, "values"))]
    packed = [_arrays.take_in(x, f"{n}_packed")[0] for x, n in ((k_packed, "k"), (v_packed, "v"))]
    norms = [_arrays.take_in(x, f"{n}_norms")[0] for x, n in ((k_norms, "k"), (v_norms, "v"))]
    slots, _ = _arrays.take_in(slot_mapping, "slot_mapping")
    for i, name in enumerate(("keys", "values")):
        _check_side(specs[i], vectors[i], name, packed[i], norms[i], "kv"[i], vectors[0])
    if vectors[0].shape[:2] != vectors[1].shape[:2] or vectors[0].dtype != vectors[1].dtype:
        raise ValueError(
            "keys and values must have the same tokens, heads and dtype, got "
            f"{vectors[0].shape} {vectors[0].dtype} and {vectors[1].shape} {vectors[1].dtype}"
        )
    if norms[0].shape != norms[1].shape:
        raise ValueError(
            "the caches of keys and values must have the same blocks, got "
            f"{norms[0].shape} and {norms[1].shape}"
        )
    slots = _take_in_slots(slots, vectors[0])
    num_slots = norms[0].shape[0] * norms[0].shape[1]
    if check:
        _check_slots(slots, num_slots)
    backend = quantizers[0]._backend_for(vectors[0])
    backend.encode_paged(
        specs[0],
        specs[1],
        _arrays.native(vectors[0]),
        _arrays.native(vectors[1]),
        packed[0],
        norms[0],
        packed[1],
        norms[1],
        slots,
    )
    if check:
        for i in range(2):
            _check_scales(backend, vectors[i], norms[i], slots)


def _check_side(
    spec: CodecSpec, vectors: Any, name: str, packed: Any, norms: Any, side: str, like: Any
) -> None:
    """Shapes, dtypes, places and strides of keys or of values."""
    check_vectors(spec, vectors, name)
    if vectors.ndim != 3:
        raise ValueError(
            f"{name} must have shape [num_tokens, num_kv_heads, {spec.head_dim}], "
            f"got {vectors.shape}"
        )
    heads = vectors.shape[1]
    if packed.dtype != np.uint8:
        raise TypeError(f"{side}_packed must be uint8, got {packed.dtype}")
    if norms.dtype.name != "float32" or not norms.dtype.isnative:
        raise TypeError(f"{side}_norms must be float32, got {norms.dtype}")
    if packed.ndim != 4 or packed.shape[2:] != (heads, spec.packed_dim):
        raise ValueError(
            f"{side}_packed must have shape [num_blocks, block_size, {heads}, {spec.packed_dim}], "
            f"got {packed.shape}"
        )
    if norms.shape != packed.shape[:3]:
        raise ValueError(f"{side}_norms must have shape {packed.shape[:3]}, got {norms.shape}")
    if packed.size and packed.shape[3] > 1 and packed.strides[3] != 1:
        raise ValueError(
            f"the last axis of {side}_packed must be contiguous, its stride is {packed.strides[3]}"
        )
    for array, array_name in ((packed, f"{side}_packed"), (norms, f"{side}_norms")):
        check_same_place(array, array_name, like, "keys")
        if isinstance(array, np.ndarray) and not array.flags.writeable:
            raise ValueError(f"{array_name} is read-only")
    check_same_place(vectors, name, like, "keys")


def _take_in_slots(slots: Any, keys: Any) -> Any:
    if slots.dtype.name not in ("int32", "int64"):
        raise TypeError(f"slot_mapping must be int32 or int64, got {slots.dtype}")
    if slots.shape != keys.shape[:1]:
        raise ValueError(
            f"slot_mapping must have one slot a token, shape {keys.shape[:1]}, got {slots.shape}"
        )
    check_same_place(slots, "slot_mapping", keys, "keys")
    slots = _arrays.native(slots)
    return slots if slots.flags.c_contiguous else slots.copy()


def _check_slots(slots: Any, num_slots: int) -> None:
    host = slots.get() if _backend.device_of(slots) == "cuda" else slots
    wrong = (host < -1) | (host >= num_slots)
    if wrong.any():
        token = int(wrong.argmax())
        raise ValueError(
            f"slot_mapping[{token}] is {host[token]}; slots go from 0 to {num_slots - 1}, "
            "and -1 skips a token"
        )
    used, first, counts = np.unique(host[host >= 0], return_index=True, return_counts=True)
    if (counts > 1).any():
        slot = int(used[counts > 1][np.argmin(first[counts > 1])])
        tokens = [int(token) for token in np.flatnonzero(host == slot)[:2]]
        raise ValueError(f"slot_mapping sends tokens {tokens[0]} and {tokens[1]} to slot {slot}")


def _check_scales(backend: _backend.Backend, vectors: Any, norms: Any, slots: Any) -> None:
    """Raise as TurboQuant.encode does if a scale that was written is not finite."""
    used = slots >= 0
    block_size = norms.shape[1]
    written = norms[slots[used] // block_size, slots[used] % block_size]
    if written.size and (row := backend.first_non_finite(written)) is not None:
        raise value_error(vectors[used], row)
