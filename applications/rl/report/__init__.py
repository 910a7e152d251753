"""Figures and tables of finished runs, compared with the published ones."""
