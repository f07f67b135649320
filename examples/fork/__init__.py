"""A TorchTitan fork that registers this package's model: see docs/forks.md."""
