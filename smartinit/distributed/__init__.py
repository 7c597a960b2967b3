"""Small states between ranks; activations stay where they are."""
