"""Dashboards, alerts and settings for Grafana and Prometheus, as text. Knows the metrics' names, and asks nobody."""
