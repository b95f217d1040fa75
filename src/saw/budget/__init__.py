"""Package saw.budget (see docs/architecture.md)."""
