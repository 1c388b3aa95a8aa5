"""What the tables of made-up models say, on a real pretrained model: see __main__.py."""
