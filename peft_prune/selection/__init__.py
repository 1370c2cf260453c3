"""Which units stay, on tensors alone: granularity, top-k, allocation, schedules."""
