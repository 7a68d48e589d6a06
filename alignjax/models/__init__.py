"""Decoders as plain pytrees."""
