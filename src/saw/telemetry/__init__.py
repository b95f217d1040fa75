"""What a host's journal says, as OCSF events: read by cursor, kept in a bounded spool, delivered until it is acknowledged."""
