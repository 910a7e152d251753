"""Figures and tables of finished runs, beside the published ones."""
