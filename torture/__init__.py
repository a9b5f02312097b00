"""`make torture`: jobs that are killed, stopped, robbed of their disk or their folder, and gone on with."""
