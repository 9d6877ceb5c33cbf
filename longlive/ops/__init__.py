"""Functions of tensors: attention backends, rotary embedding, flow matching."""
