"""Tasks and the environments in which agents act."""
