"""Measurements: time to first token, the store against plain reads and copies, and gains that must last."""
