"""Weights that a model ties stay tied when an adapter trains them: ``ensure_weight_tying``."""
