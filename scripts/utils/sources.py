"""Where the rows come from: ``data.raw``, or several sources of ``data.sources`` with a share or a limit each.

Which rows a share or a limit takes is decided by the hash of their content alone, so that rows added to a source move
few of the others, and the same config takes the same rows on every machine.
"""

import heapq
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.utils import data_hub, records
from scripts.utils.errors import UserError
from scripts.utils.raw_files import find_files

if TYPE_CHECKING:
    from scripts.utils.schema import DataSection

_HASHES = 2 ** (8 * records.DIGEST_BYTES)


@dataclass(frozen=True)
class Source:
    """Files that are read alike; ``weight`` is the share of their rows to take, ``limit`` the number."""

    paths: tuple[Path, ...]
    format: str
    columns: Mapping[Any, str]
    weight: float | None = None
    limit: int | None = None

    def open_file(self, path: Path) -> records.FileRecords:
        return records.open_file(path, self.format, self.columns)


def find(data: "DataSection") -> tuple[list[Source], list[str]]:
    """The sources that the config names, and warnings of what is passed over. Raises ``UserError`` as find_files."""
    if not data.sources:
        paths, warnings = find_files(_local(data.raw))
        return [Source(tuple(paths), data.format, data.columns)], warnings
    found, warnings = [], []
    named: dict[Path, int] = {}
    for number, item in enumerate(data.sources, 1):
        paths, more = find_files(_local(item.raw))
        warnings += more
        for path in paths:
            if (first := named.setdefault(path.resolve(), number)) != number:
                message = f"{path} stands in data.sources twice, in the sources {first} and {number}"
                raise UserError(message, "take it out of one of them")
        columns = data.columns if item.columns is None else item.columns
        found.append(Source(tuple(paths), item.format or data.format, columns, item.weight, item.limit))
    return found, warnings


def _local(raw: str | list[str]) -> str | list[str]:
    """What is on the hub as what is on this disk."""
    return data_hub.local(raw) if isinstance(raw, str) else [data_hub.local(name) for name in raw]


def bound(source: Source) -> bytes | None:
    """The largest content hash that is taken from a source; None takes all. A limit reads the source once for it."""
    if source.weight is not None and source.weight < 1:
        return max(int(source.weight * _HASHES) - 1, 0).to_bytes(records.DIGEST_BYTES)
    if source.limit is None:
        return None
    smallest: list[int] = []  # the negated smallest hashes so far, the largest of them first
    taken: set[int] = set()
    for path in source.paths:
        for digest in itertools.chain.from_iterable(source.open_file(path).mapped(_digests)):
            place = int.from_bytes(digest)
            if not digest or place in taken:
                continue
            if len(smallest) < source.limit:
                heapq.heappush(smallest, -place)
            elif place < -smallest[0]:
                taken.discard(-heapq.heapreplace(smallest, -place))
            else:
                continue
            taken.add(place)
    return None if len(smallest) < source.limit else (-smallest[0]).to_bytes(records.DIGEST_BYTES)


def _digests(part: list[records.Record]) -> list[bytes]:
    return [b"" if record.content is None else record.digest for record in part]
