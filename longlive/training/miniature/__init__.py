"""Training of the miniature's own parts: text encoder, autoencoder, teacher, causal initialisation."""
