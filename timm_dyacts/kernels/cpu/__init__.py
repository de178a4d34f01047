"""The passes on CPUs: PyTorch operations on blocks that stay in the cache, in place.

A chain of operations on a large tensor reads and writes main memory with each of them, and new memory for what is in
between costs more still. Here a block goes through the whole chain before the next is touched.
"""
