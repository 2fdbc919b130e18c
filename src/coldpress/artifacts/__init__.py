"""Models as they lie on disk."""
