"""Options that had another name in version 0.1; `applications.common.renamed` refuses them."""

RENAMED = {
    "eval_beside": "background_eval",
    "together": "stacked",
    "graph": "cuda_graphs",
    "slow_rate": "target_rate",
    "slow_gradient": "target_gradient",
    "slow_base": "target_behaviour",
}
"""New name of an option by its old name."""
