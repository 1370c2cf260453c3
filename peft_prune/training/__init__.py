"""Training helpers. They look at the tuners from outside; nothing in the tuners knows of them."""
