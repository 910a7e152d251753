"""Is the tilt right on real data?"""
