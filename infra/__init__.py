"""What runs around quee: deployment, servers on loopback."""
