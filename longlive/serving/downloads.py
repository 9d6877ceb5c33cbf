"""Recordings as they are downloaded: what was whole when the download began, in ranges if the client asks for them.

A recording may grow or be replaced while it is read. Knows nothing about sessions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastapi.responses import Response, StreamingResponse

CHUNK_BYTES = 1 << 18


def whole_length(file: BinaryIO) -> int:
    """Bytes of an mp4 up to the end of its last whole fragment; of one that is not fragmented, of all its whole boxes.

    What follows is still being written, or was when the server was killed.
    """
    total, start, whole = file.seek(0, os.SEEK_END), 0, 0
    kinds: set[bytes] = set()
    while start + 8 <= total:
        file.seek(start)
        head = file.read(16)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if size < 8 or start + size > total:
            break
        start += size
        kinds.add(kind)
        if kind != b"moof" and kinds >= {b"moov", b"mdat"}:  # a fragment is `moof` and `mdat`
            whole = start
    return whole


def _asked(header: str | None, length: int) -> range | None:
    """The bytes that a Range header asks for; None for all of them, also when several ranges are asked for. Empty when there are none."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", (header or "").replace(" ", ""))
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:
        return range(max(0, length - int(last)), length)
    if last and int(last) < int(first):
        return None
    return range(int(first), min(length, int(last) + 1 if last else length))


def _read(file: BinaryIO, part: range) -> Iterator[bytes]:
    with file:
        file.seek(part.start)
        left = len(part)
        while left and (data := file.read(min(CHUNK_BYTES, left))):
            left -= len(data)
            yield data


def download(path: Path, *, range_header: str | None, if_range: str | None, only_headers: bool = False) -> Response:
    """The answer to a request for a recording; called in a thread, and its file is read in threads.

    Raises:
        FileNotFoundError: when there is none, or nothing of it is whole yet.
    """
    file = path.open("rb")
    length = whole_length(file)
    if length == 0:
        file.close()
        raise FileNotFoundError(path)
    tag = f'"{os.fstat(file.fileno()).st_ino:x}-{length:x}"'
    part = _asked(range_header, length) if if_range in (None, tag) else None
    headers = {"Accept-Ranges": "bytes", "ETag": tag, "Cache-Control": "no-cache"}
    headers["Content-Disposition"] = f'attachment; filename="{path.name}"'
    if part is not None and not part:
        file.close()
        return Response(status_code=416, headers={"Content-Range": f"bytes */{length}"})
    status = 200 if part is None else 206
    if part is not None:
        headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{length}"
    part = range(length) if part is None else part
    headers["Content-Length"] = str(len(part))
    if only_headers:
        file.close()
        return Response(None, status, headers, media_type="video/mp4")
    return StreamingResponse(_read(file, part), status, headers, media_type="video/mp4")
