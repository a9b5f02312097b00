"""Pictures of what encoders see: `nopad view`."""
