"""Compares an INT8 engine with a float engine of the same model, kernel by kernel, and proposes rules that save time.

All of it works on two precision receipts with kernel times: `compare` is the entry.
"""
