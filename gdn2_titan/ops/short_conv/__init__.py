"""The short convolution: ``api`` is what is called; its kernels are ``windowed``, in PyTorch, and ``triton``."""
