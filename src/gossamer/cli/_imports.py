"""How a command imports what is heavy. Knows nothing of what it imports."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Import heavy libraries here: the garbage collector waits, and never looks at what has come with them.

    Torch makes hundreds of thousands of objects that all stay. Going through them again and again took a quarter of
    its import, and would go on after it.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
