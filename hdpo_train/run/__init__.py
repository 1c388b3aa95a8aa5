"""A run's folder: what is written there, and how a run goes on from it."""
