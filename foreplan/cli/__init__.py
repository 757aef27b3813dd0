"""The command line: one module per job, each command a thin shell around a library call."""
