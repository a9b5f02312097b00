"""A finished table in use: search, duplicates, clusters, an index."""
