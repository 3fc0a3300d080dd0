"""Latency tables: which widths to measure (`design`), what they say (`fit`). Numbers only, no device."""
