"""The sequences of a cache: their identifiers, their pages, and who shares these."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ._kv_memory import LayerMemory
from ._kv_plan import Planner, Windows
from ._kv_swap import SwappedSequence, swap_in, swap_out
from ._pages import Page, PagePool, Sequence

if TYPE_CHECKING:
    from ._kv_step import Step

__all__ = ["SequenceStore"]


class SequenceStore:
    """What `PagedKVCache` does with sequences as a whole.

    Parameters
    ----------
    windows : Windows
    num_full_blocks, num_blocks, max_sequences : int
        Pages of each pool, and slots of key offsets.
    groups : list of LayerMemory
        Memory of the pages.
    """

    def __init__(
        self,
        windows: Windows,
        num_full_blocks: int,
        num_blocks: int,
        max_sequences: int,
        groups: list[LayerMemory],
    ) -> None:
        self._windows, self._groups = windows, groups
        self._full = PagePool(num_full_blocks, "full-precision pages")
        self._packed = PagePool(num_blocks, "packed pages")
        self._offsets = PagePool(max_sequences, "key offsets (max_sequences)")
        self._planner = Planner(windows, self._full, self._packed, self._offsets)
        self._sequences: dict[int, Sequence] = {}
        self._swapped: dict[int, SwappedSequence] = {}
        self._next_sequence = 0
        self._open_step: Step | None = None
        self._attended_step: Step | None = None  # finished, its pages not packed yet
        self._version = 0  # counts what makes page tables of earlier steps invalid

    @property
    def sequences(self) -> list[int]:
        """Identifiers of all sequences, swapped-out ones included."""
        return sorted([*self._sequences, *self._swapped])

    def allocate(self) -> int:
        """Start an empty sequence; returns its identifier.  Takes no memory yet."""
        return self._register(Sequence())

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        swapped = self._swapped.get(sequence)
        return swapped.length if swapped else self._get(sequence).length

    def fork(self, sequence: int) -> int:
        """A second sequence with the same tokens, which shares their pages until one is written.

        Returns
        -------
        int
            Identifier of the new sequence.
        """
        self._no_open_step("fork")
        source = self._get(sequence)
        for page in source.pages:
            self._planner.pool(page).share(page.number)
        if source.offset is not None:
            self._offsets.share(source.offset)
        return self._register(source.copy())

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the tokens from `length` on, for example rejected speculative ones.

        A page that was packed stays packed; if tokens are appended to a partly filled one, it goes
        on in full precision from its decoded tokens.
        """
        self._no_open_step("truncate")
        state = self._get(sequence)
        if isinstance(length, bool) or not isinstance(length, (int, np.integer)):
            raise TypeError(f"length must be an integer, got {length!r}")
        if not 0 <= length <= state.length:
            raise ValueError(
                f"sequence {sequence} has {state.length} tokens, cannot truncate it to {length}"
            )
        keep = -(-int(length) // self._windows.block_size)
        self._release(state.pages[keep:])
        del state.pages[keep:]
        state.length = int(length)
        if length == 0 and state.offset is not None:
            self._offsets.release(state.offset)
            state.offset = None

    def free(self, sequence: int) -> None:
        """Forget a sequence; its pages are free unless a fork shares them."""
        self._no_open_step("free")
        if self._swapped.pop(sequence, None):
            return
        state = self._get(sequence)
        self._release(state.pages)
        if state.offset is not None:
            self._offsets.release(state.offset)
        del self._sequences[sequence]

    def swap_out(self, sequence: int) -> None:
        """Move a sequence to host memory, out of the pages; `swap_in` brings it back.

        Pages that a fork shares are copied.
        """
        self._no_open_step("swap out")
        swapped = swap_out(self, self._get(sequence))
        self.free(sequence)
        self._swapped[sequence] = swapped

    def swap_in(self, sequence: int) -> None:
        """Bring a sequence back from host memory.

        Raises
        ------
        OutOfPagesError
            If there are not enough pages; it stays in host memory.
        """
        self._no_open_step("swap in")
        if sequence not in self._swapped:
            raise ValueError(f"sequence {sequence!r} is not swapped out")
        self._version += 1  # it may take pages that the last step still attends to
        self._sequences[sequence] = swap_in(self, self._swapped[sequence])
        del self._swapped[sequence]

    def _release(self, pages: list[Page]) -> None:
        self._version += 1
        for page in pages:
            self._planner.pool(page).release(page.number)

    def _register(self, state: Sequence) -> int:
        identifier = self._next_sequence
        self._next_sequence += 1
        self._sequences[identifier] = state
        return identifier

    def _get(self, sequence: int) -> Sequence:
        try:
            return self._sequences[sequence]
        except (KeyError, TypeError):
            if sequence in self._swapped:
                raise ValueError(
                    f"sequence {sequence} is swapped out; swap_in({sequence})"
                ) from None
            known = ", ".join(map(str, self._sequences)) or "none"
            raise ValueError(f"no sequence {sequence!r} in the cache; there are {known}") from None

    def _settle(self) -> None:
        """Pack what the last step left to be packed until its attention was over."""
        if self._attended_step is not None:
            self._attended_step.pack()  # if it fails, for want of memory, it can be tried again
            self._attended_step = None

    def _no_open_step(self, what: str) -> None:
        self._settle()
        if self._open_step is not None:
            raise RuntimeError(
                f"cannot {what} while a step is open: append to layers "
                f"{sorted(self._open_step.missing)} first, or call its cancel()"
            )
