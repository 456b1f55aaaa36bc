"""The ha service."""
