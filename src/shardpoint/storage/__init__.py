"""Places where checkpoints lie: bytes by name, and nothing of plans."""
