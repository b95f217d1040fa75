"""Hardening as an external scanner sees it: reports read strictly, a floor under the score, waivers that run out."""
