"""Read a PNG image as grey levels, with numpy and zlib alone.

Enough for scanned documents: eight bits a channel, not interlaced. Colour becomes grey by the
weights of ITU-R 601 in Pillow's integer form, so that the levels equal its ``convert("L")``.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from agent_tools.errors import UserError

Bytes = npt.NDArray[np.uint8]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB, _PALETTE, _GREY_ALPHA, _RGB_ALPHA = 0, 2, 3, 4, 6
_CHANNELS = {_GREY: 1, _RGB: 3, _PALETTE: 1, _GREY_ALPHA: 2, _RGB_ALPHA: 4}
_WEIGHTS = np.array([19595, 38470, 7471], dtype=np.uint32)  # of red, green and blue, in 1 / 65536


def read_grey(data: bytes, name: str = "image") -> Bytes:
    """Grey levels 0 … 255 of shape (height, width).

    `UserError`, with ``name``, for what is no PNG, is broken, or is of another kind.
    """
    try:
        chunks = dict(_chunks(data))
        width, height, depth, kind, _, _, interlace = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
        if depth != 8 or kind not in _CHANNELS or interlace:
            raise UserError(f"{name}: only plain PNG with 8 bits a channel can be read")
        lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), dtype=np.uint8)
        pixels = _unfilter(lines.reshape(height, 1 + width * _CHANNELS[kind]), _CHANNELS[kind])
        pixels = pixels.reshape(height, width, _CHANNELS[kind])
        if kind == _PALETTE:
            palette = np.frombuffer(chunks[b"PLTE"], dtype=np.uint8).reshape(-1, 3)
            return _grey(palette)[pixels[:, :, 0]]
    except (KeyError, IndexError, ValueError, struct.error, zlib.error):
        raise UserError(f"{name} is no PNG image or is broken: download it again") from None
    return _grey(pixels[:, :, :3]) if kind in (_RGB, _RGB_ALPHA) else pixels[:, :, 0]


def _grey(colours: Bytes) -> Bytes:
    """(…, 3) to (…)."""
    return ((colours @ _WEIGHTS + 0x8000) >> 16).astype(np.uint8)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content; all the pieces of the image data as one."""
    if not data.startswith(_SIGNATURE):
        raise ValueError
    image, place = bytearray(), len(_SIGNATURE)
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        content = data[place + 8 : place + 8 + length]
        if kind == b"IDAT":
            image += content
        else:
            yield kind, content
        place += 12 + length
    yield b"IDAT", bytes(image)


def _unfilter(lines: Bytes, step: int) -> Bytes:
    """Undo the filter of each line; ``step`` is the number of bytes a pixel."""
    done = np.zeros((len(lines) + 1, lines.shape[1] - 1), dtype=np.uint8)
    for row, (kind, line) in enumerate(zip(lines[:, 0].tolist(), lines[:, 1:], strict=True)):
        above = done[row]
        if kind == 0:
            done[row + 1] = line
        elif kind == 1:  # difference from the left: a running sum, channel by channel
            sums = np.cumsum(line.reshape(-1, step), axis=0, dtype=np.uint8)
            done[row + 1] = sums.reshape(-1)
        elif kind == 2:
            done[row + 1] = line + above
        elif kind in (3, 4):
            done[row + 1] = _predicted_line(line.tolist(), above.tolist(), step, mean=kind == 3)
        else:
            raise ValueError
    return done[1:]


def _predicted_line(line: list[int], above: list[int], step: int, *, mean: bool) -> list[int]:
    """A line filtered by the mean of left and above, or by Paeth's choice of three."""
    out = [0] * len(line)
    for place, value in enumerate(line):
        up = above[place]
        left, corner = (out[place - step], above[place - step]) if place >= step else (0, 0)
        if mean:
            guess = (left + up) // 2
        else:
            far_left, far_up = abs(up - corner), abs(left - corner)
            far_corner = abs(left + up - 2 * corner)
            if far_left <= far_up and far_left <= far_corner:
                guess = left
            else:
                guess = up if far_up <= far_corner else corner
        out[place] = (value + guess) & 0xFF
    return out
