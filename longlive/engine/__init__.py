"""How a network runs, applied to it from outside: sharding, activation checkpointing, low precision."""
