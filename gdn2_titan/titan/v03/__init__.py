"""What is particular to TorchTitan 0.3.x, the generation of config functions."""
