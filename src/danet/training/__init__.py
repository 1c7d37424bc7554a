"""Training: losses, schedule, checkpoints, and the loop."""
