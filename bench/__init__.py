"""Measures the bus beside its peers. Not part of the product, and never decides a test.

`make bench`, or here `python -m bench --only NAME --rounds 5 --json`.
"""
