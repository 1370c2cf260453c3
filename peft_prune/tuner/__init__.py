"""The tuner: targets, refusals, loading, several adapters, and what PEFT needs to know."""
