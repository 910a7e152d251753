"""What all applications draw with: the look of a figure, and the arrays it takes."""
