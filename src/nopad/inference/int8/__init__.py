"""int8 version of an encoder's blocks, for a CPU."""
