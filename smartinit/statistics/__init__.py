"""Mergeable summaries of a layer's input rows."""
