"""Traces, a simulated tier and offline bounds for `simulate_eviction.py`."""
