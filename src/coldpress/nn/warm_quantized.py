"""Importing this module imports what QLoRA training needs; a waiting worker does it early."""

from coldpress.nn.imports import load_training

__all__: list[str] = []

load_training(quantized=True)
