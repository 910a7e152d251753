"""The version of the package, read by setup.cfg, by `flows` and `adjoint`, and by checkpoints."""

__version__ = "0.2.0"
