"""The made records as a fixture, whichever way pytest imports test files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def made() -> ModuleType:
    """`report_records.py` beside this file."""
    spec = importlib.util.spec_from_file_location("report_records", Path(__file__).with_name("report_records.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
