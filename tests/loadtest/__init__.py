"""Tests of the load tests, the tuner and the report."""
