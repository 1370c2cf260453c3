"""What a training loop or a user calls: schedule, calibration, pruning once, the end."""
