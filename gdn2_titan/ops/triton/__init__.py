"""The operators' GPU kernels, in Triton. Imported when the first of them runs, so that the package works without it.

causal_conv1d.py  the short convolution, forward and backward
target.py         which device a tensor is on, what it can do, and what is refused
products.py       the matrix product
launching.py      the one place where a kernel is started; its configurations, tuned or pinned
"""
