"""The conformance kit: attack cases tried from inside any sandbox, with a recorder outside that proves what arrived."""
