"""Problems, figures and clocks that several benchmarks share."""
