"""What holds for all tests."""

from __future__ import annotations

import signal
from collections import Counter

import pytest

# A shell starts what it puts in the background with Ctrl-C ignored, and programs started from there inherit
# that. Tests that interrupt themselves or a child mean the usual behaviour.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first: handed out last, one of them would be waited for alone."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # stable: within a file nothing moves
