"""TorchTitan's llama3 with Gated DeltaNet-2 in every second layer: ``v02`` for TorchTitan 0.2.2, ``v03`` for 0.3."""
