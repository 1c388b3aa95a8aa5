"""What a step needs, before it runs."""
