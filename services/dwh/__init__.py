"""The dwh service."""
