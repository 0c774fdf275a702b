"""Adapters to other packages, a module each. None is imported before somebody asks for it."""
