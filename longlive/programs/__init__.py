"""What the command-line programs share: settings, the terminal, recordings."""
