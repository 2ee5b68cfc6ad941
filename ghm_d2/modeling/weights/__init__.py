"""Weight files and checkpoints, read as data and written atomically."""
