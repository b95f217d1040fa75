"""Budgets: what a call may cost at most, what it cost, and the ledger that holds both against a limit."""
