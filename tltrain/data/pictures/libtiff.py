"""libtiff's own messages: it prints them to stderr, where they name no file. Here the thread that decodes gets them."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator

from PIL import Image

_thread = threading.local()
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)


def listen() -> None:
    """From now on libtiff prints no errors. Where Pillow's libtiff cannot be reached, it prints as before."""
    with contextlib.suppress(OSError, AttributeError):
        set_handler = ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler  # type: ignore[attr-defined]  # of the libtiff that Pillow has loaded
        set_handler.argtypes, set_handler.restype = [_Handler], ctypes.c_void_p
        set_handler(_keep)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """Inside, libtiff's error messages of this thread are appended to the list."""
    said: list[str] = []
    _thread.said = said
    try:
        yield said
    finally:
        _thread.said = None


def _kept(module: bytes | None, template: bytes | None, values: int | None) -> None:
    """A TIFFErrorHandler: (function, format of printf, va_list). libtiff calls it in the thread that decodes."""
    said = getattr(_thread, "said", None)
    if said is None or template is None:
        return
    text = ctypes.create_string_buffer(300)
    ctypes.CDLL(None).vsnprintf(text, ctypes.c_size_t(len(text)), template, ctypes.c_void_p(values))
    said.append(text.value.decode(errors="replace"))


_keep = _Handler(_kept)  # a name of this module, so that it outlives every call
