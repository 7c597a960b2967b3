"""How many ranks every target gets."""
