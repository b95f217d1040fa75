"""Package saw.policy (see docs/architecture.md)."""
