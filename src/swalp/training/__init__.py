"""Training runs: settings, data, networks, the loop, and what a run leaves on disk."""
