"""What is particular to TorchTitan 0.2.2, the generation of TOML files."""
