"""The rows that reach each target layer, read off ordinary forward passes."""
