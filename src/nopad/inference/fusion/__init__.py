"""Fused layers: blocks folded into four GEMMs and one attention call, and the backends that run the GEMMs."""
