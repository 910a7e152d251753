"""Parts that all applications share: command line, run folder, callbacks, pictures."""
