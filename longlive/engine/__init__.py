"""How a network runs, applied to it from outside: compiled and recorded passes, 8-bit layers, checkpointing, low precision, sharding."""
