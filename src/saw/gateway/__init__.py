"""Ring 2: the decision, the credentials and the Envoy configuration of the perimeter, outside every workspace VM."""
