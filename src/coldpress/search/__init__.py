"""Search: which settings meet the goals, and which of those is the best."""
