"""Pictures of tilts in the plane."""
