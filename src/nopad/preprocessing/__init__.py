"""From files to pixels by each model's own rule."""
