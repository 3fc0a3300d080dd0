"""Compensation: what is repaired from calibration examples alone, without labels or training."""
