"""Limits of what is decoded and encoded; nothing heavy is imported here."""

MAX_PIXELS = 178_956_970
"""Largest image that is decoded or made by a resize, in pixels: the number at which Pillow refuses to open one."""
