"""What a block may attend to: a ring buffer for inference, immutable pages for training."""
