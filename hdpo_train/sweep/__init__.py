"""Several α and seeds from one model, and what they show."""
