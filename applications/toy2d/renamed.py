"""Options that had another name in version 0.1; `applications.common.renamed` refuses them."""

RENAMED = {"refine": "refine_fraction", "variates": "control_variates"}
"""New name of an option by its old name."""
