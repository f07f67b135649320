"""What the Triton kernels of all operators share.

products.py          device functions: matrix product and rounding
launching.py         the one place where a kernel is started, tuned or pinned
target.py            which device a tensor is on, what it can do, and what is refused
"""
