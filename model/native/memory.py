"""Large memory pages, where the system has them: fewer address look-ups for large tensors."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

_PAGE = 2 << 20


def prefer_large_pages(tensor: Tensor) -> None:
    """Ask for large pages for a tensor in this machine's memory that nothing was written to yet.

    A wish: what the system makes of it changes no number.
    """
    begin = -(-tensor.data_ptr() // _PAGE) * _PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
    if sys.platform == "linux" and tensor.device.type == "cpu" and begin < end:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        madvise(begin, end - begin, mmap.MADV_HUGEPAGE)
