"""The ``saw`` command."""
