"""What an encoder computes on the way: tokens of single layers, and attention maps."""
