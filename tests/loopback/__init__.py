"""Stand-in boards on loopback for the device tests."""
