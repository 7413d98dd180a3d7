"""Benchmarks: `python -m bench` measures pycnf beside its peers on this machine."""
