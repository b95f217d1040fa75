"""Lifecycle jobs: the kinds there are, what a worker and the broker say to each other, and the executors that run them."""
