"""Gated DeltaNet-2 (arXiv 2605.22791) for PyTorch: the op, the layer, the models, and the TorchTitan plug.

Import what you need: ``gdn2_titan.ops`` (torch only), ``gdn2_titan.models``, ``gdn2_titan.parallel``,
``gdn2_titan.titan`` (the only part that needs TorchTitan).
"""

__version__ = "0.1.0"
