"""Drift: what the collection's plays would change on hosts, whom they could not ask, and who answers for the rest."""
