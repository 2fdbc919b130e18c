"""The torch side: loading and training."""
