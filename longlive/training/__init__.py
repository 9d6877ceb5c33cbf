"""Training: streaming long tuning, distribution matching, ODE initialisation, the training loop."""
