"""From text to typed values: the config language, its older dialects, and what is wrong with a file."""
