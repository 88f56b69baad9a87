"""Shells: what connects the pure core to sockets, threads, files and the compute."""
