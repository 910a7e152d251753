"""Datasets of transitions: loading, making and replaying them."""
