"""What holds for all tests."""

from __future__ import annotations

import signal

# A shell starts what it puts in the background with Ctrl-C ignored, and programs started from there inherit
# that. Tests that interrupt themselves or a child mean the usual behaviour.
signal.signal(signal.SIGINT, signal.default_int_handler)
