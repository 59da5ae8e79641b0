"""What appending tokens does to pages, planned for all sequences before anything is changed.

The plan says where every new token goes, which pages are copied because they are shared, which
packed pages are unpacked because tokens are added to them, and which pages are packed because they
leave the window of recent tokens.  All layers carry out the same plan, one after the other.

Pages that lie outside of the window of the first new token are packed before a step's attention,
those that leave it later in the step behind it: so tokens see their window in full precision,
however many come at a time.  Where that does not matter, all can be packed first, which takes no
full-precision pages for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ._pages import Page, PagePool, Sequence, first_recent_page

__all__ = ["Moves", "NewOffset", "Packing", "Plan", "Planner", "Windows"]


@dataclass(frozen=True)
class Windows:
    """Sizes that decide which pages are packed.

    Attributes
    ----------
    block_size : int, tokens of a page
    sink_tokens, recent_tokens : int, first and last tokens kept in full precision, as whole pages
    key_offset_tokens : int, first keys whose mean is removed from all; 0 for none
    """

    block_size: int
    sink_tokens: int
    recent_tokens: int
    key_offset_tokens: int

    @property
    def sink_pages(self) -> int:
        return -(-self.sink_tokens // self.block_size)

    def packed_pages(self, length: int) -> range:
        """The pages of a sequence that lie outside of both windows."""
        recent = first_recent_page(length, self.recent_tokens, self.block_size)
        return range(self.sink_pages, max(self.sink_pages, recent))


@dataclass
class Moves:
    """Token `to[i]` of the target is token `source[i]` of the source."""

    to: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)

    def add(self, to: int, source: int, count: int) -> None:
        self.to.extend(range(to, to + count))
        self.source.extend(range(source, source + count))


@dataclass
class NewOffset:
    """A key offset to be taken: slot, and the first keys of its sequence."""

    slot: int
    from_full: Moves = field(default_factory=Moves)
    from_new: Moves = field(default_factory=Moves)


@dataclass
class Packing:
    """Pages that are packed together.

    Attributes
    ----------
    new_offsets : key offsets to be taken first
    packs : (to packed page, offset slot or -1); `from_full` and `from_new` say where the tokens of
        these pages, counted through in this order, come from
    """

    new_offsets: list[NewOffset] = field(default_factory=list)
    packs: list[tuple[int, int]] = field(default_factory=list)
    from_full: Moves = field(default_factory=Moves)
    from_new: Moves = field(default_factory=Moves)

    @property
    def needs_new_tokens(self) -> bool:
        """Whether anything comes from the new tokens, which every layer brings by itself."""
        return any(moves.to for moves in (self.from_new, *(n.from_new for n in self.new_offsets)))


@dataclass
class Plan:
    """One step.  Tokens are counted through the pages of a pool, or through the new tokens.

    Attributes
    ----------
    pack_first : whether nothing is left to be packed behind the step
    after : the sequences as they will be
    counts : new tokens of each
    during : the sequences as the step attends to them
    write : new tokens into the full-precision pool
    copies : (to, from) pages of the full-precision pool
    thaws : (to full page, from packed page, offset slot or -1)
    first, behind : what is packed before and behind the step's attention
    taken, released : pages to give back if the step is cancelled, or when it is done
    taken_offsets : likewise, offset slots
    """

    pack_first: bool
    after: list[Sequence]
    counts: list[int]
    during: list[Sequence] = field(default_factory=list)
    write: Moves = field(default_factory=Moves)
    copies: list[tuple[int, int]] = field(default_factory=list)
    thaws: list[tuple[int, int, int]] = field(default_factory=list)
    first: Packing = field(default_factory=Packing)
    behind: Packing = field(default_factory=Packing)
    taken: list[Page] = field(default_factory=list)
    taken_offsets: list[int] = field(default_factory=list)
    released: list[Page] = field(default_factory=list)


class Planner:
    """Makes plans, taking pages from the pools."""

    def __init__(
        self, windows: Windows, full: PagePool, packed: PagePool, offsets: PagePool
    ) -> None:
        self.windows, self.full, self.packed, self.offsets = windows, full, packed, offsets

    def plan(
        self, sequences: Iterable[Sequence], counts: Iterable[int], *, pack_first: bool
    ) -> Plan:
        """Plan one step; if pages run out, everything taken for it is given back.

        Raises
        ------
        OutOfPagesError
        """
        plan = Plan(pack_first, [s.copy() for s in sequences], list(counts))
        try:
            first_new = 0
            for sequence, count in zip(plan.after, plan.counts, strict=True):
                plan.during.append(
                    self._extend(plan, sequence, count, first_new) if count else sequence
                )
                first_new += count
        except MemoryError:
            self.cancel(plan)
            raise
        return plan

    def cancel(self, plan: Plan) -> None:
        """Give back what a plan took."""
        for page in plan.taken:
            self.pool(page).release(page.number)
        for slot in plan.taken_offsets:
            self.offsets.release(slot)

    def finish(self, plan: Plan) -> None:
        """Give back what a plan replaced."""
        for page in plan.released:
            self.pool(page).release(page.number)

    def pool(self, page: Page) -> PagePool:
        return self.full if page.full else self.packed

    def _extend(self, plan: Plan, sequence: Sequence, count: int, first_new: int) -> Sequence:
        """Append `count` tokens, the new tokens from `first_new` on; the state to attend to."""
        size = self.windows.block_size
        before, after = sequence.length, sequence.length + count
        packed_first = self.windows.packed_pages(after if plan.pack_first else before + 1)
        touched = range(before // size, -(-after // size))
        if before % size:
            self._make_writable(plan, sequence, touched[0], touched[0] in packed_first)
        to_pack = self._to_pack(sequence, packed_first)
        if to_pack and self._lacks_offset(sequence):
            self._take_offset(plan, plan.first, sequence, before, after, first_new)
        for i in sorted({*to_pack, *touched}):
            if i in packed_first:
                self._pack(plan, plan.first, sequence, i, before, first_new)
            else:
                self._write(plan, sequence, i, before, after, first_new)
        sequence.length = after
        during = sequence.copy()
        to_pack = self._to_pack(sequence, self.windows.packed_pages(after))
        if to_pack and self._lacks_offset(sequence):
            self._take_offset(plan, plan.behind, sequence, after, after, first_new)
        for i in to_pack:
            self._pack(plan, plan.behind, sequence, i, after, first_new)
        return during

    @staticmethod
    def _to_pack(sequence: Sequence, packed: range) -> list[int]:
        """Those of the pages in `packed` that are new or in full precision."""
        pages = sequence.pages
        return [i for i in packed if i >= len(pages) or pages[i].full]

    def _lacks_offset(self, sequence: Sequence) -> bool:
        return sequence.offset is None and self.windows.key_offset_tokens > 0

    def _write(
        self, plan: Plan, sequence: Sequence, i: int, before: int, after: int, first_new: int
    ) -> None:
        """New tokens go to page i in full precision."""
        size = self.windows.block_size
        if i == len(sequence.pages):
            sequence.pages.append(self._take(plan, full=True))
        start, stop = max(before, i * size), min(after, (i + 1) * size)
        slot = sequence.pages[i].number * size + start % size
        plan.write.add(slot, first_new + start - before, stop - start)

    def _make_writable(self, plan: Plan, sequence: Sequence, i: int, packed_next: bool) -> None:
        """Page i gets tokens: it must be in full precision and, unless packed next, our own."""
        page = sequence.pages[i]
        if not page.full:
            new = self._take(plan, full=True)
            offset = -1 if sequence.offset is None else sequence.offset
            plan.thaws.append((new.number, page.number, offset))
        elif self.full.is_shared(page.number) and not packed_next:
            new = self._take(plan, full=True)
            plan.copies.append((new.number, page.number))
        else:
            return
        plan.released.append(page)
        sequence.pages[i] = new

    def _take_offset(
        self,
        plan: Plan,
        packing: Packing,
        sequence: Sequence,
        before: int,
        after: int,
        first_new: int,
    ) -> None:
        """Plan the mean of the first keys, which all are new or in full precision."""
        size = self.windows.block_size
        sequence.offset = self.offsets.take()
        plan.taken_offsets.append(sequence.offset)
        new_offset = NewOffset(sequence.offset)
        stop = min(after, self.windows.key_offset_tokens)
        for token in range(min(before, stop)):
            slot = sequence.pages[token // size].number * size + token % size
            new_offset.from_full.add(token, slot, 1)
        if stop > before:
            new_offset.from_new.add(before, first_new, stop - before)
        packing.new_offsets.append(new_offset)

    def _pack(
        self,
        plan: Plan,
        packing: Packing,
        sequence: Sequence,
        i: int,
        before: int,
        first_new: int,
    ) -> None:
        """Page i moves to the packed pool; its tokens are old ones in full precision or new."""
        size = self.windows.block_size
        at, start = len(packing.packs) * size, i * size
        old = min(max(before - start, 0), size)
        new = self._take(plan, full=False)
        packing.packs.append((new.number, -1 if sequence.offset is None else sequence.offset))
        if old:
            page = sequence.pages[i]
            packing.from_full.add(at, page.number * size, old)
            plan.released.append(page)
        if old < size:
            packing.from_new.add(at + old, first_new + start + old - before, size - old)
        if i == len(sequence.pages):
            sequence.pages.append(new)
        else:
            sequence.pages[i] = new

    def _take(self, plan: Plan, full: bool) -> Page:
        page = Page(full, (self.full if full else self.packed).take())
        plan.taken.append(page)
        return page
