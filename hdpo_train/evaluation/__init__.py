"""Models on prompts whose answers a program checks."""
