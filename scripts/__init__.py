"""Short programs that a person runs as `python3 -m scripts.NAME`: parse, call, print."""
