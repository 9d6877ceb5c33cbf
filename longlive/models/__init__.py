"""Networks: the Wan2.1 transformer (student, teacher and critic), text encoder, VAE, LoRA."""
