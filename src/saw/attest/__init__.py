"""Package saw.attest (see docs/architecture.md)."""
