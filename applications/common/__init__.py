"""What all applications share: run folders, command lines, pictures."""
