"""Volery: an event-driven manager for KVM hosts and their virtual machines."""
