"""How small a difference of kernel times says nothing.

Measured with TensorRT 8.6.1 on an H200, on the INT8 and FP16 engines of eight models and batch sizes.
"""

WORTH = 0.05
"""Share of an engine's time below which nothing is proposed.

A profiler adds 2 to 4 microseconds to each kernel, so that the times of kernels add up to 1.1 to 3.5 times the engine's
own. How much faster one engine is than the other, the sums tell to 4 to 10 % (one pair: 23 %). What is less than that
may be a loss; and a build with other types chooses the kernels around them anew.
"""

WORTH_A_RULE = 0.005
"""Share of an engine's time that each rule of a proposal has to save, or the list grows long for nothing."""

RESOLUTION_MS = 0.001
"""Difference of two kernels' times below which they are equal.

Events resolve half a microsecond; what a profiler adds to the mean kernel differs by up to 1 between two engines.
"""
