"""Models: loaded, and what runs inside of them."""
