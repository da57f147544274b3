"""What runs around quee: deployment, servers on loopback, what an MLflow server loads."""
