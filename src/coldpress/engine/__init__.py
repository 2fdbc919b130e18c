"""Plan, store, run."""
