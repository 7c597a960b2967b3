"""Pure tensor functions: no models, no files, loops with fixed bounds."""
