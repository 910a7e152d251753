"""Small velocity networks."""
