"""Fuzz targets in Python: what peers send to a whole node, over every door that it has."""
