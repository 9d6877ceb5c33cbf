"""How a network runs, applied to it from outside: sharding, 8-bit linear layers, activation checkpointing, low precision."""
