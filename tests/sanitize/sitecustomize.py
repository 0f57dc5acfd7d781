"""Makes every Python that starts with this folder on PYTHONPATH import the extension that GOSSAMER_CPU_MODULE names.

`make sanitize` runs tests on a build of its own that way; child processes of a test inherit both variables. Python
imports this file by itself when it starts, after the hook of the editable install, in front of which it then stands.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType

EXTENSION = "gossamer.kernels._cpu"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the one extension, and nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != EXTENSION:
            return None
        return importlib.util.spec_from_file_location(fullname, os.environ["GOSSAMER_CPU_MODULE"])


if "GOSSAMER_CPU_MODULE" in os.environ:
    sys.meta_path.insert(0, _Finder())
