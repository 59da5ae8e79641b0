"""Moves of tokens and pages as index arrays where a cache lives, made once for all layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ._kv_plan import Moves, Packing

__all__ = ["NewOffsetIndices", "PackingIndices", "TokenMoves", "index_packing", "token_moves"]


class TokenMoves(NamedTuple):
    """Token `to[i]` of the target is token `source[i]` of the source; slices where that does."""

    size: int
    to: Any
    source: Any

    @property
    def in_order(self) -> bool:
        """Whether the target is filled from its first token on."""
        return isinstance(self.to, slice) and self.to.start == 0


class NewOffsetIndices(NamedTuple):
    """A key offset to be taken; see `_kv_plan.NewOffset`."""

    slot: int
    from_full: TokenMoves
    from_new: TokenMoves


class PackingIndices(NamedTuple):
    """Pages that are packed together; see `_kv_plan.Packing`."""

    size: int
    pages: Any
    offsets: Any
    new_offsets: list[NewOffsetIndices]
    from_full: TokenMoves
    from_new: TokenMoves


def token_moves(xp: Any, moves: Moves) -> TokenMoves:
    """Indices of moves, for numpy or cupy."""
    return TokenMoves(len(moves.to), _index(xp, moves.to), _index(xp, moves.source))


def index_packing(xp: Any, packing: Packing) -> PackingIndices:
    """Indices of a packing."""
    return PackingIndices(
        len(packing.packs),
        xp.asarray(np.array([page for page, _ in packing.packs], np.int64)),
        xp.asarray(np.array([offset for _, offset in packing.packs], np.int64)),
        [
            NewOffsetIndices(
                new.slot, token_moves(xp, new.from_full), token_moves(xp, new.from_new)
            )
            for new in packing.new_offsets
        ],
        token_moves(xp, packing.from_full),
        token_moves(xp, packing.from_new),
    )


def _index(xp: Any, numbers: list[int]) -> Any:
    """A slice, which makes a view, where numbers are in order; else an array of them."""
    first = numbers[0] if numbers else 0
    if numbers == list(range(first, first + len(numbers))):
        return slice(first, first + len(numbers))
    return xp.asarray(np.array(numbers, np.int64))
