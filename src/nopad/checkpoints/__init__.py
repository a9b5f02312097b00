"""Checkpoints: what their files hold, the table of each dialect, the strict check, loading."""
