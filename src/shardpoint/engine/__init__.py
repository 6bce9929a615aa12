"""Runs plans: moves bytes between storage and memory in one bounded executor."""
