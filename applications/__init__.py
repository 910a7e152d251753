"""Applications supply rewards; the tilting is that of the package ``adjoint``."""
