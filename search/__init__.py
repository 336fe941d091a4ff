"""Which architectures to look at, and what to tell the user."""
