"""Puts this folder on the path: what tests of several folders share lies here."""
