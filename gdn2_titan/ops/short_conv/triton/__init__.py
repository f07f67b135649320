"""The convolution's GPU kernels, in Triton: ``launches`` is what is called. Imported when the first of them runs."""
