"""Chaos: whatever dies in the middle of a sweep, the same command ends with the same fronts and loses nothing."""
