"""Problems, networks, figures, clocks and worker processes that several benchmarks share."""
