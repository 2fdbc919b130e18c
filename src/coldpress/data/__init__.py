"""From records to token sequences."""
