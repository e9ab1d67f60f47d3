"""Training of the small shipped networks."""
