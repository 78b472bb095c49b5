"""Adapters: difflbfgs behind the interfaces of other packages."""
