"""`make fuzz`: hostile files without end, and what must hold whatever is in them."""
