"""One run: from a checked cfg to a folder with checkpoints and records."""
