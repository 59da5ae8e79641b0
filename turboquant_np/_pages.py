"""Pages of a cache: which are free, who shares them, which stay in full precision."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["OutOfPagesError", "Page", "PagePool", "Sequence", "first_recent_page"]


class OutOfPagesError(MemoryError):
    """The cache has no free page (or offset slot) left; nothing was changed."""


class Page(NamedTuple):
    """A page of a sequence: one of the full-precision pool or of the packed pool."""

    full: bool
    number: int


class PagePool:
    """Reference counts of `count` pages; a page with none is free."""

    def __init__(self, count: int, what: str) -> None:
        self.what = what
        self.references = [0] * count
        self._free = list(range(count))[::-1]

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    @property
    def used(self) -> list[int]:
        """Pages with references, ascending."""
        return [page for page, count in enumerate(self.references) if count]

    def require(self, count: int) -> None:
        """Raise `OutOfPagesError` unless `count` pages are free."""
        if count > self.free:
            raise OutOfPagesError(
                f"{count} {self.what} needed, {self.free} of {len(self.references)} free; "
                "free or swap out sequences, or make the cache larger"
            )

    def take(self) -> int:
        """A free page, with one reference."""
        self.require(1)
        page = self._free.pop()
        self.references[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more reference."""
        self.references[page] += 1

    def release(self, page: int) -> None:
        """One reference less."""
        self.references[page] -= 1
        if self.references[page] == 0:
            self._free.append(page)

    def is_shared(self, page: int) -> bool:
        return self.references[page] > 1


@dataclass
class Sequence:
    """Tokens of one sequence: page i holds tokens i * block_size and on.

    The packed pages are neighbours: full ones come before them (the sink) and after them (the most
    recent tokens).  `offset` is the slot of the key offset, None until the first page is packed.
    """

    length: int = 0
    pages: list[Page] = field(default_factory=list)
    offset: int | None = None

    def copy(self) -> Sequence:
        return Sequence(self.length, list(self.pages), self.offset)


def first_recent_page(length: int, recent_tokens: int, block_size: int) -> int:
    """The first page with one of the most recent tokens, or with room for the next one.

    Examples
    --------
    >>> from turboquant_np._pages import first_recent_page
    >>> [first_recent_page(n, recent_tokens=64, block_size=16) for n in (64, 79, 80, 100)]
    [0, 0, 1, 2]
    """
    return max(0, length - recent_tokens) // block_size
