"""How much memory does an update take?"""
