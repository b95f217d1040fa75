"""The encrypted data disk of a workspace: a LUKS2 volume whose key the machine's own TPM holds (docs/data-disk.md)."""
