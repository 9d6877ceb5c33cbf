"""What a block may attend to: a ring buffer for inference, an append-only buffer for training."""
