"""Tensors -> scalar: the training losses; no model lives here."""
