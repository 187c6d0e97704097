"""Packages that call `generate` for their users: a module for each, imported by name."""
