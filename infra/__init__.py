"""What runs around quee: files that servers load."""
