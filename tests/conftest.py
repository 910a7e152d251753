"""A conftest makes pytest put this folder on the path, so that tests share its helper modules."""
