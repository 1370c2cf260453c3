"""Masks over plain tensors: how important, how many, which ones, stored how. Knows neither PEFT nor Transformers."""
