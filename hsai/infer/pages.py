"""Who holds which page of the cache, and where the beginning of a prompt lies already.

A page is free, or held by one row or several, or held by none and kept because its tokens may come again: it has a name
then, and is given up when pages run short, the one first that was needed longest ago. Only full pages have names. A
name is a digest of all tokens up to the page's last one, so that equal names mean equal contents: keys and values
depend on all tokens before. (Automatic prefix caching, as in vLLM. The digest is cryptographic: whoever writes prompts
must not be able to make one that finds another's page.)

This is bookkeeping in plain Python: no array is touched.
"""

import collections
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

Name = bytes


def name_pages(tokens: Sequence[int], size: int, names: Sequence[Name] = ()) -> list[Name]:
    """The names of the full pages of `tokens`, of `size` tokens each; `names` are those of the first ones, if known."""
    found = list(names)
    for start in range(len(found) * size, len(tokens) - size + 1, size):
        content = np.asarray(tokens[start : start + size], np.int32).tobytes()
        found.append(hashlib.blake2b((found[-1] if found else b"") + content, digest_size=16).digest())
    return found


class PagePool:
    """Pages by number, from 0."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._names: dict[int, Name] = {}
        self._named: dict[Name, int] = {}
        self._kept: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def available(self) -> int:
        """Pages that `take` could give."""
        return len(self._free) + len(self._kept)

    @property
    def kept(self) -> int:
        """Pages that nobody holds, with tokens that may come again."""
        return len(self._kept)

    @property
    def held(self) -> int:
        """Pages that somebody holds."""
        return self.count - self.available

    def take(self, count: int) -> list[int] | None:
        """Pages for a new holder, whose contents are anything; None, and nothing changes, if there are not so many."""
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._kept.popitem(last=False)
                del self._named[self._names.pop(page)]
            self._holders[page] = 1
            pages.append(page)
        return pages

    def find(self, names: Iterable[Name]) -> list[int]:
        """The pages of the first names, up to one that no page has; the caller holds them from now on."""
        pages = []
        for name in names:
            if (page := self._named.get(name)) is None:
                break
            self._kept.pop(page, None)
            self._holders[page] += 1
            pages.append(page)
        return pages

    def name(self, page: int, name: Name) -> None:
        """Says what a held page is full of. Where another page has the name already, this one stays without."""
        if page not in self._names and name not in self._named:
            self._names[page] = name
            self._named[name] = page

    def give(self, pages: Sequence[int]) -> None:
        """One holder less of each: of those with none left, named ones are kept, the last of them given up first."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0 and page in self._names:
                self._kept[page] = None
            elif self._holders[page] == 0:
                self._free.append(page)
