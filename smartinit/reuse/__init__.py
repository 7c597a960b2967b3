"""What need not be computed again: between the computation and the store, which know nothing of each other."""
