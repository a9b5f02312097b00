"""Images of what encoders see: `nopad view`."""
