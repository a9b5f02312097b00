"""Float8 layers: the number format, modules with float8 weights, and the conversion of an encoder's blocks."""
