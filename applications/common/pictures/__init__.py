"""Drawing for all applications: the look of a figure, and the arrays it takes."""
