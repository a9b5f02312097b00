"""What a bulk job writes, and how it is read."""
