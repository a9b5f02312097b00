"""Training on packs."""
