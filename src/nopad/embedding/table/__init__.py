"""Tables of features: their format, writing and reading."""
